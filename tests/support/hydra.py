"""YAML files for ``fairseq-hydra-train``."""

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from omegaconf import OmegaConf

MODEL_NAMES = {
    "evomoe_lm_tiny": "evomoe_lm",
    "evomoe_roberta_tiny": "evomoe_roberta",
    "evomoe_transformer_tiny": "evomoe_transformer",
}


def write_yaml(path, data, settings, name=None, **common):
    """The YAML file for settings that are otherwise given as flags."""
    options = {group: vars(getattr(FairseqConfig(), group)) for group in ("common", "dataset", "checkpoint")}
    options["task"] = vars(TASK_DATACLASS_REGISTRY[settings["task"]]())
    options["model"] = vars(MODEL_DATACLASS_REGISTRY[MODEL_NAMES[settings["arch"]]]())
    options["criterion"] = vars(CRITERION_DATACLASS_REGISTRY[settings["criterion"]]())
    cfg = {
        group: {key: value for key, value in settings.items() if key in known}
        for group, known in options.items()
    }
    cfg["common"].update(common, user_dir=str(settings["user_dir"]))
    cfg["task"].update(_name=settings["task"], data=str(data))
    cfg["model"].update(_name=name or settings["arch"])
    cfg["criterion"].update(_name=settings["criterion"])
    cfg["optimizer"] = {"_name": settings["optimizer"], "lr": [settings["lr"]]}
    cfg["optimization"] = {"lr": [settings["lr"]], "max_update": settings["max_update"]}
    cfg["lr_scheduler"] = {"_name": "fixed"}
    OmegaConf.save(OmegaConf.create(cfg), path)
