"""fairseq's optimizers and precisions, and the state that they keep of a parameter."""

import torch

OPTIMIZERS = {
    "adam": {"weight_decay": 0.1},
    "adamax": {},
    "sgd": {"momentum": 0.9},
    "nag": {"momentum": 0.9},
    "adagrad": {},
    "adadelta": {},
    "adafactor": {"relative_step": False, "scale_parameter": False, "beta1": 0.9},
}
MIXED = {
    "fp16": {"fp16": True, "fp16_no_flatten_grads": True, "fp16_init_scale": 4},
    "flat_fp16": {"fp16": True, "fp16_init_scale": 4},
    "memory_efficient_fp16": {"memory_efficient_fp16": True, "fp16_init_scale": 4},
    "bf16": {"common": {"bf16": True}},
    "memory_efficient_bf16": {"common": {"bf16": True, "memory_efficient_bf16": True}},
}


def copy_state(value):
    if isinstance(value, dict):
        return {key: copy_state(each) for key, each in value.items()}
    return value.clone() if torch.is_tensor(value) else value


def assert_same_state(a, b):
    assert a["statistics"].keys() == b["statistics"].keys()
    for key, value in a["statistics"].items():
        if torch.is_tensor(value):
            assert torch.equal(value, b["statistics"][key]), key
        else:
            assert value == b["statistics"][key], key
    assert (a["master"] is None) == (b["master"] is None)
    assert a["master"] is None or torch.equal(a["master"], b["master"])
