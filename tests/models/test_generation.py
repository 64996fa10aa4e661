"""Generation: every command, and no dependence on the other sentences of the batch."""

import functools
import re

import pytest
import torch

from fairseq_evomoe.moe import ROUTERS, record
from support.cli import LM, MASKED_LM, TRANSLATION, build, call, parameters, run
from support.evaluation import EVALUATION, hypotheses
from support.tasks import PLAIN, dense

OTHERS = [name for name, cls in ROUTERS.items() if name != "dts" and not cls.needs_whole_sequence]
BEAM = {"beam": 2, "max_len_b": 60, **EVALUATION}


@pytest.fixture(scope="module")
def translator(translation_data, tmp_path_factory):
    """Checkpoint of a translator that has learnt something."""
    folder = tmp_path_factory.mktemp("translator")
    settings = {**TRANSLATION, "max_update": 120, "batch_size": 32, "moe_spawn_update": 30}
    settings.update(moe_anneal_updates=30, moe_hard_update=40, disable_validation=True, save_interval=100)
    call("fairseq-train", translation_data, save_dir=folder, **settings)
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def hypotheses_of(translation_data, translator):
    """Function that translates the test set in batches of a size, with each size once."""
    options = dict(path=translator, remove_bpe="sentencepiece", required_batch_size_multiple=1, **BEAM)

    @functools.cache
    def translate(size):
        return hypotheses(call("fairseq-generate", translation_data, batch_size=size, **options).output)

    return translate


def bleu(output):
    return float(re.search(r"BLEU\S* = ([\d.]+)", output).group(1))


def test_the_console_script_and_both_scorers(translation_data, translator):
    options = dict(path=translator, beam=3, batch_size=16, remove_bpe="sentencepiece", **EVALUATION)
    default = run("fairseq-generate", translation_data, **options)
    sacre = call("fairseq-generate", translation_data, scoring="sacrebleu", **options)
    assert hypotheses(default.output) == hypotheses(sacre.output) and len(hypotheses(sacre.output)) == 40
    assert "▁" not in "".join(hypotheses(sacre.output).values())
    references = dict(re.findall(r"^T-(\d+)\t(.*)$", sacre.output, flags=re.MULTILINE))
    text = (translation_data / "test.en").read_text().splitlines()
    assert all(references[str(i)] == line for i, line in enumerate(text))

    import sacrebleu

    found = [hypotheses(sacre.output)[str(i)] for i in range(40)]
    assert bleu(sacre.output) == pytest.approx(sacrebleu.corpus_bleu(found, [text]).score, abs=0.01)
    assert bleu(default.output) > 20


def test_interactive_translates_what_generate_does(translation_data, translator, hypotheses_of):
    text = (translation_data / "test.de").read_text()
    result = run(
        "fairseq-interactive",
        translation_data,
        stdin="".join(text.splitlines(keepends=True)[:8]),
        bpe="sentencepiece",
        sentencepiece_model=translation_data / "spm.model",
        source_lang="de",
        target_lang="en",
        path=translator,
        **BEAM,
    )
    assert hypotheses(result.output) == {str(i): hypotheses_of(1)[str(i)] for i in range(8)}


def test_hypotheses_do_not_depend_on_the_batch(hypotheses_of):
    one, many = hypotheses_of(1), hypotheses_of(32)
    assert one.keys() == many.keys()
    assert sum(one[i] != many[i] for i in one) <= 0.03 * len(one)


def load(setup, path):
    setup.model.load_state_dict(parameters(path))
    return setup.model.eval()


@pytest.mark.parametrize("routing", ["top1", "adaptive"])
def test_a_token_s_output_does_not_depend_on_the_batch(routing, translation_data, translator):
    """The MoE layers inside the model, in a padded batch and one sentence at a time."""
    setup = build(translation_data, **{**TRANSLATION, "moe_eval_routing": routing})
    model = load(setup, translator)
    outputs = {}
    for name, module in model.named_modules():
        if name.endswith(".moe"):
            module.register_forward_hook(lambda _, args, y, name=name: outputs.setdefault(name, []).append(y))
    batch = max(setup.batches(), key=lambda batch: int(batch["net_input"]["src_tokens"].eq(1).sum()))
    source, previous = batch["net_input"]["src_tokens"], batch["net_input"]["prev_output_tokens"]
    lengths = batch["net_input"]["src_lengths"]
    assert source.eq(1).any() and previous.eq(1).any()
    with torch.no_grad():
        model(source, lengths, previous)
        together, outputs = dict(outputs), outputs.clear() or outputs
        for i in range(source.shape[0]):
            here = slice(source.shape[1] - int(lengths[i]), None)
            model(source[i : i + 1, here], lengths[i : i + 1], previous[i : i + 1, previous[i].ne(1)])
    for name, (whole,) in together.items():
        for i, alone in enumerate(outputs[name]):
            mask = (source if "encoder" in name else previous)[i].ne(1)
            assert torch.allclose(whole[i, mask], alone[0], atol=1e-6), name
            assert whole[i, ~mask].abs().sum() == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"decoder_normalize_before": True}]
    + [{"moe_router": router} for router in OTHERS]
    + [{"moe_heads": 2}, {"moe_shared_expert": True, "moe_expert_activation": "swiglu"}]
    + [{"moe_router": "hash", "moe_hashes": 2}, {"moe_hard_experts": 2, "moe_scaling_factor": 2.0}]
    + [{"moe_hyper_adapter": True}, {"moe_expert_sizes": "arithmetic"}]
    + [{"moe_preset": "moe_plus_plus"}, {"moe_balance": "quantile"}, {"moe_preset": "ds_moe"}],
    ids=str,
)
def test_incremental_decoding_is_full_decoding(options, translation_data):
    """With left padding in the encoder, beams reordered or not: each step depends on its tokens alone."""
    setup = build(translation_data, **{**TRANSLATION, "moe_spawn_update": 0, "moe_freq": 1, **options})
    for name, parameter in setup.model.named_parameters():
        if "hyper_adapter" in name:  # starts with zeros, which could hide what is wrong
            torch.nn.init.normal_(parameter, std=0.1)
    model = setup.model.eval()
    batch = setup.batches("valid")[0]["net_input"]
    tokens = batch["prev_output_tokens"]
    with torch.no_grad():
        encoded = model.encoder(batch["src_tokens"], src_lengths=batch["src_lengths"])
        full = model.decoder(tokens, encoder_out=encoded)[0]
        state = {}
        for i in range(tokens.shape[1]):
            step = model.decoder(tokens[:, : i + 1], encoder_out=encoded, incremental_state=state)[0]
            real = tokens[:, i].ne(1)
            assert torch.allclose(step[real, 0], full[real, i], atol=1e-5), i


@pytest.mark.parametrize("router", OTHERS)
def test_every_router_generates(router, translation_data, tmp_path):
    """Beam search over padded batches gives what it gives one sentence at a time."""
    settings = {**TRANSLATION, **PLAIN, "moe_router": router, "moe_freq": 1, "max_update": 12, "lr": 0.01}
    call("fairseq-train", translation_data, save_dir=tmp_path, **settings, disable_validation=True)
    options = dict(path=tmp_path / "checkpoint_last.pt", beam=3, max_len_b=6, **EVALUATION)
    one, many = (
        call("fairseq-generate", translation_data, batch_size=size, required_batch_size_multiple=1, **options)
        for size in (1, 16)
    )
    one, many = hypotheses(one.output), hypotheses(many.output)
    assert len(one) == 40 and one.keys() == many.keys()
    assert sum(one[i] != many[i] for i in one) <= 2


def test_soft_mixing_does_not_depend_on_the_batch(lm_data):
    setup = build(lm_data, **{**MASKED_LM, **PLAIN, "moe_router": "soft", "moe_slots": 2, "moe_freq": 1})
    model = setup.model.eval()
    batch = max(setup.batches(), key=lambda batch: int(batch["net_input"]["src_tokens"].eq(1).sum()))
    source = batch["net_input"]["src_tokens"]
    assert source.eq(1).any()
    with torch.no_grad():
        together = model(source)[0]
        for i, row in enumerate(source):
            alone = model(row[row.ne(1)].unsqueeze(0))[0]
            assert torch.allclose(together[i, row.ne(1)], alone[0], atol=1e-5)


@pytest.mark.parametrize("settings", [TRANSLATION, MASKED_LM, LM], ids=lambda settings: settings["task"])
@pytest.mark.parametrize("spawned", [False, True])
def test_padding_is_neither_routed_nor_counted(settings, spawned, request):
    data = request.getfixturevalue("translation_data" if settings is TRANSLATION else "lm_data")
    setup = build(data, **{**settings, "moe_spawn_update": 0 if spawned else 6})
    batch = max(setup.batches(), key=lambda batch: int(batch["net_input"]["src_tokens"].eq(1).sum()))
    setup.model.eval()
    with torch.no_grad(), record() as routings:
        setup.model(**batch["net_input"])
    source = batch["net_input"]["src_tokens"]
    padding = {"encoder": source.eq(1), "decoder": source.eq(1)}
    if settings is TRANSLATION:
        padding["decoder"] = batch["net_input"]["prev_output_tokens"].eq(1)
    for name, module in setup.model.named_modules():
        if name.endswith(".moe"):
            mask = padding[name.split(".")[0]]
            assert mask.any() or settings is LM
            assert routings[module].tokens == (~mask).sum()
            assert routings[module].token_N.shape[0] == (~mask).sum()


def test_eval_lm_from_the_console(lm_data, trained):
    evaluated = run(
        "fairseq-eval-lm",
        lm_data,
        path=trained(LM).last,
        gen_subset="valid",
        batch_size=8,
        tokens_per_sample=16,
        **EVALUATION,
    )
    found = float(re.search(r"Perplexity: ([\d.]+)", evaluated.output).group(1))
    assert found == pytest.approx(trained(LM).log("valid")[-1]["valid_ppl"], rel=0.03)  # as for a dense model


def test_validate_from_the_console(lm_data, trained):
    names = {
        "task": "language_modeling",
        "criterion": "evomoe_cross_entropy",
        "tokens_per_sample": 16,
        "batch_size": 8,
    }
    validated = run("fairseq-validate", lm_data, path=trained(LM).last, **names, **EVALUATION)
    assert " loss {:g} ".format(trained(LM).log("valid")[-1]["valid_loss"]) in validated.output


def test_generation_of_a_model_that_has_not_grown(translation_data, tmp_path):
    settings = {**TRANSLATION, "save_interval_updates": 6, "max_update": 7}
    call("fairseq-train", translation_data, save_dir=tmp_path, **settings)
    call(
        "fairseq-train", translation_data, save_dir=tmp_path / "dense", **{**dense(settings), "max_update": 6}
    )
    outputs = [
        call(
            "fairseq-generate",
            translation_data,
            path=tmp_path / path,
            beam=1,
            batch_size=16,
            max_len_b=20,
            **EVALUATION,
        ).output
        for path in ("checkpoint_1_6.pt", "dense/checkpoint_last.pt")
    ]
    ours, theirs = map(hypotheses, outputs)
    assert sum(ours[i] != theirs[i] for i in ours) <= 0.03 * len(ours)
