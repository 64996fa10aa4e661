"""One model used from several threads gives the results of one thread."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fairseq_evomoe.moe import record
from support.cli import LM, TRANSLATION
from support.models import layers, make_model

# what routers are told of tokens, of the stack, of nothing; with and without padding
ROUTERS = [
    {"moe_router": "dts"},
    {"moe_router": "dts", "moe_gate_input": "both"},
    {"moe_router": "hash"},
    {"moe_router": "switch"},
    {"moe_router": "topk", "moe_gate_input": "table"},
    {"moe_router": "recurrent"},
    {"moe_router": "base"},
    {"moe_router": "topk", "moe_balance": "bias"},
    {"moe_router": "remoe"},
]
THREADS, TRANSLATIONS = 4, 40


@pytest.fixture(autouse=True)
def switching_often():
    """Threads take turns after a few operations; a sum has the same order each time."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def same_in_threads(function, items):
    """Whether a function of each item gives in several threads what it gives in one."""
    alone = [function(item) for item in items]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(function, items))
    return [one == other for one, other in zip(alone, together)]


def name(options):
    return "-".join(options.values())


@pytest.mark.parametrize("options", ROUTERS, ids=name)
def test_translations(options, request):
    setup = make_model(request, TRANSLATION, **options)
    setup.model.eval()
    setup.cfg.generation.update(beam=2, max_len_a=0, max_len_b=3)
    setup.task.load_dataset("train")
    dataset = setup.task.dataset("train")
    samples = [dataset.collater([dataset[i % len(dataset)]]) for i in range(TRANSLATIONS)]

    def translate(sample):
        generator = setup.task.build_generator([setup.model], setup.cfg.generation)
        found = setup.task.inference_step(generator, [setup.model], sample)
        return [(each["tokens"].tolist(), each["positional_scores"].tolist()) for each in found[0]]

    assert all(same_in_threads(translate, samples))


@pytest.mark.parametrize("options", ROUTERS, ids=name)
def test_scores_and_their_logs(options, request):
    setup = make_model(request, LM, **options)
    setup.model.eval()
    batches = setup.batches()

    @torch.no_grad()
    def score(batch):
        with record() as routings:
            loss, _, log = setup.criterion(setup.model, batch)
        chosen = [routings[moe].expert_N.tolist() for moe in layers(setup.model).values()]
        return float(loss), log["moe_load"].tolist(), float(log["moe_balance"]), chosen

    assert all(same_in_threads(score, batches * 4))


def test_gradients_with_activations_computed_again_in_another_thread(request):
    """As autograd does on a GPU: the thread of the backward pass has seen other batches, or none."""
    setup = make_model(request, LM, moe_router="hash", checkpoint_activations=True, moe_experts=4)
    model, (one, two) = setup.model.train(), setup.batches()[:2]

    def gradients(backward):
        model.zero_grad()
        loss, _, _ = setup.criterion(model, one)
        backward(loss)
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    def elsewhere(loss):
        with ThreadPoolExecutor(1) as pool:
            with torch.no_grad():
                pool.submit(setup.criterion, model, two).result()
            pool.submit(loss.backward).result()

    here, there = gradients(torch.Tensor.backward), gradients(elsewhere)
    assert here.keys() == there.keys()
    assert all(torch.equal(gradient, there[key]) for key, gradient in here.items())
