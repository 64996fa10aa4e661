"""On a GPU: it computes what the CPU computes, in every router, precision and phase.

Skipped where there is none; ``pytest tests/test_gpu.py`` on a machine that has one.  Sums of floating point
numbers have another order on each run there, so that results are compared with tolerances.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

from fairseq_evomoe.criterions.moe import statistics
from fairseq_evomoe.moe import ROUTERS, Experts, Hidden, MoELayer, Routing, RoutingContext, Vocabulary, record
from fairseq_evomoe.moe.assignment import balanced_assignment
from fairseq_evomoe.moe.device_assignment import nearly_best_assignment
from fairseq_evomoe.moe.dispatch import kernels
from fairseq_evomoe.moe.dispatch import local as ways
from fairseq_evomoe.moe.dispatch.kernels import launch
from fairseq_evomoe.moe.dispatch.local import dispatch
from support.assignments import check_loads
from support.cli import LM, TRANSLATION, build, call, parameters, run
from support.dispatching import make_experts as made
from support.dispatching import routing_of, slow
from support.evaluation import EVALUATION, hypotheses, scores
from support.experts import make_experts, random_routing, slow_dispatch
from support.models import with_router
from support.resume import check_resume
from support.tasks import DATA, PLAIN, TASKS, check_phases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CPU = {"cpu": True}


def error(ours, exact):
    """The norm of the difference, as a share of the norm."""
    exact = exact.double().cpu()
    return float((ours.double().cpu() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 2e-3), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)],
    ids=["float64", "float32", "float16", "bfloat16"],
)
@pytest.mark.parametrize("widths", [[32], [48] * 4, [16, 48, 8, 64]], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("activation", [torch.relu, F.gelu])
def test_dispatch_equals_a_loop_over_pairs(dtype, tolerance, widths, density, activation):
    torch.manual_seed(1)
    experts = make_experts(32, widths, dtype, Hidden(activation))
    routing = random_routing(50, len(widths), density)
    routing.weight_N = routing.weight_N.to(torch.float64 if dtype == torch.float64 else torch.float32)
    x, direction = torch.randn(50, 32).to(dtype), torch.randn(50, 32).to(dtype)
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        own, placed = copy.deepcopy(experts).to(device, kind), copy.copy(routing)
        placed.token_N, placed.expert_N = routing.token_N.to(device), routing.expert_N.to(device)
        weight = routing.weight_N.to(device)
        placed.weight_N = (weight.double() if device == "cpu" else weight).requires_grad_()
        inputs = [x.to(device, kind).requires_grad_(), placed.weight_N, *own.parameters()]
        y = (slow_dispatch if device == "cpu" else dispatch)(inputs[0], placed, own)
        assert y.dtype == kind and y.device.type == device
        loss = (y * direction.to(device, kind)).sum()
        grads = torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else [None]
        results.append([y.detach(), *grads])
    for exact, ours in zip(*results):
        if exact is not None and ours is not None:
            assert error(ours, exact) < tolerance


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this PyTorch has no grouped products")
def test_equal_experts_wait_for_nothing_from_the_device():
    """No size of a group is copied to the host, which would have to wait for all that is queued before."""
    torch.manual_seed(1)
    experts = make_experts(32, [48] * 4, torch.bfloat16).cuda()
    routing = random_routing(50, 4, 0.3, torch.float32)
    for name in ("token_N", "expert_N", "weight_N"):
        setattr(routing, name, getattr(routing, name).cuda())
    x = torch.randn(50, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dispatch(x, routing, experts).float().sum().backward()  # workspaces and kernels are made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dispatch(x, routing, experts).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("router", ["switch", "topk", "hash", "laplace", "recurrent", "stable"])
def test_a_router_waits_for_nothing_from_the_device(router):
    """With the noise of training; the device gives no size of a group, and is given no number."""
    gate = ROUTERS[router](32, 4, vocabulary=Vocabulary(9, torch.ones(9)))
    gate.initialize(torch.Generator().manual_seed(0))
    gate.cuda().train()
    token_T = torch.randint(9, (50,), device="cuda")

    def step():
        x_TD = torch.randn(50, 32, device="cuda", requires_grad=True)
        routing = gate(x_TD, RoutingContext(token_T=token_T, noise_key=("gate", 1)))
        routing.report()
        total = routing.weight_N.sum() + sum(routing.losses.values())
        if total.requires_grad:
            total.backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_statistics_of_a_batch_wait_for_nothing_from_the_device():
    layer = MoELayer(32, 64, 4, "switch").cuda()
    layer.spawn("copy")
    with record() as routings:
        y = layer(torch.randn(50, 32, device="cuda"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = statistics(layer, [layer], routings, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found["moe_active"].tolist() == [50 * layer.experts.parameters_of_each()[0]]


HAS_KERNELS = pytest.mark.skipif(
    kernels.triton is None or not hasattr(F, "grouped_mm"), reason="no Triton or no grouped products"
)


def on_gpu(routing):
    """The routing with its tensors there, and weights that want a gradient."""
    tensors = {name: getattr(routing, name).detach().cuda() for name in ("token_N", "expert_N", "weight_N")}
    tensors["weight_N"].requires_grad_()
    return Routing(**tensors, tokens=routing.tokens, experts=routing.experts)


def values_and_gradients(x, routing, experts):
    y = dispatch(x, routing, experts)
    direction = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view_as(y).to(y.dtype)
    inputs = [x, routing.weight_N, *experts.parameters()]
    return [y.detach(), *torch.autograd.grad((y * direction).sum(), inputs)]


@HAS_KERNELS
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", [torch.relu, F.gelu, F.silu])
@pytest.mark.parametrize("dim, width", [(64, 136), (1032, 264)])
@pytest.mark.parametrize("counts", [[1, 0, 0, 299], [200, 300, 0, 77]], ids=str)
def test_kernels_are_as_exact_as_the_other_way(counts, dim, width, activation, gated, monkeypatch):
    torch.manual_seed(1)
    experts = made(dim, [width] * 4, Hidden(activation), gated, torch.float32)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.1)
    experts.bfloat16()
    routing, x = routing_of(301, counts, torch.float32), torch.randn(301, dim).bfloat16()
    exact = copy.deepcopy(experts).double().cuda()
    wide = on_gpu(routing)
    wide.weight_N = wide.weight_N.detach().double().requires_grad_()
    expected = values_and_gradients(x.double().cuda().requires_grad_(), wide, exact)
    experts.cuda()
    errors = []
    for without, candidate, look_up in (
        *(({"kernels"}, set(), False), (set(), set(), False), (set(), {"one_function"}, False)),
        *((set(), {"one_function"}, True), (set(), {"one_function"}, True)),
    ):
        monkeypatch.setattr(ways, "without", without)
        monkeypatch.setattr(ways, "candidates", candidate)
        monkeypatch.setattr(launch, "look_up", look_up)
        got = values_and_gradients(x.cuda().requires_grad_(), on_gpu(routing), experts)
        assert got[0].dtype == torch.bfloat16
        errors.append([error(a, b) for a, b in zip(got, expected)])
    other, measured, one, *looked_up = errors
    for ours in (measured, one):
        assert all(a < 1.1 * b + 1e-5 for a, b in zip(ours, other)), errors
    assert looked_up == [one, one]  # compiled, and found again


@HAS_KERNELS
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("candidates", [set(), {"one_function"}], ids=["measured", "one_function"])
def test_kernels_without_biases(candidates, gated, monkeypatch):
    monkeypatch.setattr(ways, "candidates", candidates)
    torch.manual_seed(1)
    bare, full = (Experts(64, [136] * 4, Hidden(F.silu), gated, bias).cuda() for bias in (False, True))
    for name, parameter in bare.named_parameters():
        if name[0] == "w":
            parameter.data.normal_(std=0.1)
    full.load_state_dict(bare.state_dict())
    routing, x = routing_of(301, [200, 300, 0, 77], torch.float32), torch.randn(301, 64).bfloat16().cuda()
    results = []
    for experts in (bare.bfloat16(), full.bfloat16()):
        placed, own = on_gpu(routing), x.clone().requires_grad_()
        y = dispatch(own, placed, experts)
        weights = [p for name, p in experts.named_parameters() if name[0] == "w"]
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [own, placed.weight_N, *weights])])
    assert all(error(ours, exact) < 1e-2 for ours, exact in zip(*results))
    with torch.no_grad():  # few pairs, as in generation
        few = Routing(*(torch.tensor(v).cuda() for v in ([0, 2], [3, 0], [0.5, 0.25])), tokens=3, experts=4)
        outputs = [dispatch(x[:3], few, experts) for experts in (bare, full)]
    assert error(*outputs) < 1e-2


@HAS_KERNELS
@pytest.mark.parametrize("candidates", [set(), {"one_function"}], ids=["measured", "one_function"])
def test_the_same_bits_on_every_run(candidates, monkeypatch):
    monkeypatch.setattr(ways, "candidates", candidates)
    monkeypatch.setattr(launch, "look_up", bool(candidates))
    torch.manual_seed(1)
    experts = make_experts(64, [128] * 8, torch.bfloat16).cuda()
    routing, x = routing_of(1000, [1000, 500, 0, 700, 1, 1000, 30, 400], torch.float32), torch.randn(1000, 64)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(5):
            inputs = x.bfloat16().cuda().requires_grad_(), on_gpu(routing), experts
            runs.append(values_and_gradients(*inputs))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@HAS_KERNELS
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", [torch.relu, F.gelu, F.silu])
@pytest.mark.parametrize("tokens, counts", [(1, [0, 1, 0]), (3, [2, 0, 3])])
def test_few_pairs_without_gradients(tokens, counts, activation, gated, monkeypatch):
    torch.manual_seed(1)
    experts = made(1032, [264] * 3, Hidden(activation), gated, torch.float32)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.1)
    routing, x = routing_of(tokens, counts, torch.float32), torch.randn(tokens, 1032)
    with torch.no_grad():
        expected = slow(x.double(), routing, copy.deepcopy(experts).double())
        monkeypatch.setattr(kernels, "sort_pairs", None)
        experts.bfloat16().cuda()
        got = dispatch(x.bfloat16().cuda(), on_gpu(routing), experts)
    assert error(got, expected) < 1e-2


@pytest.mark.parametrize("router", ROUTERS)
def test_a_model_computes_what_it_computes_on_the_cpu(router, lm_data):
    settings = with_router(router)
    setup = build(lm_data, **settings, **CPU)
    setup.train(7)
    batch = setup.batches()[7]["net_input"]
    results = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(setup.model).to(device, torch.float64).eval()
        model.set_num_updates(7)
        y = model(**{name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()})[0]
        y.square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        results[-1]["output"] = y.detach()
    exact, ours = results
    assert exact.keys() == ours.keys() and any(".moe." in name for name in exact)
    assert error(ours.pop("output"), exact.pop("output")) < 1e-6
    whole = torch.cat([grad.flatten() for grad in exact.values()]).norm()
    for name, grad in exact.items():
        assert (ours[name].cpu() - grad).norm() < 1e-6 * whole, name


@pytest.mark.parametrize("router", ROUTERS)
def test_one_expert_grows_into_many_with_any_router(router, lm_data):
    setup = build(lm_data, **with_router(router))
    trainer = setup.trainer()
    trainer.begin_epoch(1)
    losses = [float(trainer.train_step([batch])["loss"]) for batch in setup.batches()[:7]]
    assert all(p.device.type == "cuda" for p in setup.model.parameters())
    assert all(b.device.type == "cuda" for b in setup.model.buffers())
    layers = [module.moe for module in setup.model.modules() if hasattr(module, "moe")]
    assert layers and all(len(moe.experts.widths) == 4 for moe in layers)
    assert losses[-1] < losses[0] < 10


PRECISIONS = {
    "float32": {},
    "fp16": {"fp16": True, "fp16_init_scale": 4},
    "memory-efficient-fp16": {"memory_efficient_fp16": True, "fp16_init_scale": 4},
    "amp": {"amp": True, "fp16_init_scale": 4},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("settings", TASKS)
def test_a_task_goes_through_all_phases(settings, precision, tmp_path, request):
    data = request.getfixturevalue(DATA[settings["task"]])
    settings = {**settings, "dropout": 0, "attention_dropout": 0, "activation_dropout": 0}
    result = call("fairseq-train", data, save_dir=tmp_path, **settings, **PRECISIONS[precision])
    check_phases(result)
    exact = call("fairseq-train", data, save_dir=tmp_path / "cpu", **settings, **CPU)
    ours, theirs = ([step["loss"] for step in each.log("train_inner")] for each in (result, exact))
    # the noise of the soft stage is not that of the CPU
    assert ours[:7] == pytest.approx(theirs[:7], rel=2e-3 if precision == "float32" else 2e-2)
    assert ours[7:] == pytest.approx(theirs[7:], rel=0.1)


def test_sub_tokens_of_padded_batches_under_amp(translation_data, tmp_path):
    """Their linear maps give half precision, beside which the padding is float32."""
    settings = {**TRANSLATION, **PRECISIONS["amp"], "moe_heads": 2, "no_save": True}
    check_phases(call("fairseq-train", translation_data, save_dir=tmp_path, **settings))


@pytest.mark.parametrize("efficient", [False, True], ids=["bf16", "memory-efficient-bf16"])
def test_bfloat16(efficient, lm_data):
    """As ``common.bf16=true`` in YAML; fairseq's flag asks for a TPU, too."""
    losses = []
    for common in ({"bf16": True, "memory_efficient_bf16": efficient}, {}):
        setup = build(lm_data, **{**LM, "moe_spawn_update": 3}, dropout=0, common=common)
        trainer = setup.trainer()
        trainer.begin_epoch(1)
        losses.append([float(trainer.train_step([batch])["loss"]) for batch in setup.batches()])
        assert {p.dtype for p in setup.model.parameters()} == {torch.bfloat16 if common else torch.float32}
        assert setup.model.decoder.layers[1].moe.spawned
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_it_goes_on_where_it_was_interrupted(lm_data, tmp_path):
    settings = {**LM, "save_interval_updates": 3}
    whole = call("fairseq-train", lm_data, save_dir=tmp_path / "whole", **settings).log("train_inner")
    for stop in (3, 6, 9, 12):
        saved = next((tmp_path / "whole").glob(f"checkpoint_?_{stop}.pt"))
        folder = tmp_path / f"from{stop}"
        again = call("fairseq-train", lm_data, save_dir=folder, restore_file=saved, **settings).log(
            "train_inner"
        )
        assert [step["num_updates"] for step in again] == list(range(stop + 1, 15))
        ours, theirs = ([step["loss"] for step in each] for each in (again, whole[stop:]))
        assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize("router", ["dts", "topk", "top-p"])
def test_a_deterministic_training_resumes_bit_for_bit(router, lm_data, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch refuses products
    torch.use_deterministic_algorithms(True)
    try:
        settings = LM if router == "dts" else {**LM, "moe_router": router, "moe_hard_update": None}
        settings = {**settings, "moe_anneal_updates": None if router != "dts" else 3}
        check_resume(lm_data, tmp_path, settings, stops=[3, 9])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tokens, experts", [(4096, 16), (5000, 8)])
def test_tokens_are_assigned_on_the_gpu_without_waiting(tokens, experts):
    score = torch.randn(tokens, experts, device="cuda")
    nearly_best_assignment(score)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expert = nearly_best_assignment(score)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    best = balanced_assignment(score.cpu())
    got, most = (score.cpu().gather(1, e.cpu().unsqueeze(1)).sum() for e in (expert, best))
    check_loads(expert.cpu(), tokens, experts)
    assert got >= 0.99 * most


def test_a_checkpoint_of_a_gpu_is_one_of_the_cpu(lm_data, tmp_path):
    call("fairseq-train", lm_data, save_dir=tmp_path, **LM)
    assert all(tensor.device.type == "cpu" for tensor in parameters(tmp_path / "checkpoint_last.pt").values())
    losses = []
    for cpu in (True, False):
        names = {key: LM[key] for key in ("task", "criterion", "user_dir")}
        options = dict(path=tmp_path / "checkpoint_last.pt", batch_size=8, num_workers=0, cpu=cpu, **names)
        output = call("fairseq-validate", lm_data, **options).output
        losses.append(float(output.rsplit("| loss ", 1)[1].split()[0]))
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.mark.parametrize("fp16", [False, True], ids=["float32", "fp16"])
def test_translations_are_those_of_the_cpu(fp16, translation_data, tmp_path):
    """Nearly all are, with their scores.

    Where a beam's candidates are level, rounding decides which goes on, and fp16 has ties that float32
    has not: a few other translations, which are as good as those of the CPU.  That they are few is no measure
    of exactness, but that the same translations have the same scores is: 0.001 apart at most when fairseq's
    ``--fp16`` was tried on a CPU, where one of 120 translations was another one, 0.04 worse.
    """
    settings = {**TRANSLATION, "max_update": 120, "batch_size": 32, "moe_spawn_update": 30}
    settings.update(moe_anneal_updates=30, moe_hard_update=40, disable_validation=True)
    call("fairseq-train", translation_data, save_dir=tmp_path, **settings)
    options = dict(path=tmp_path / "checkpoint_last.pt", beam=3, batch_size=16, **EVALUATION)
    theirs = call("fairseq-generate", translation_data, **options, **CPU).output
    ours = run("fairseq-generate", translation_data, fp16=fp16, **options).output
    pairs = [(hypotheses(output), scores(output)) for output in (theirs, ours)]
    (exact, exact_score), (got, score) = pairs
    assert len(exact) == 40 and exact.keys() == got.keys()
    same = [i for i in exact if exact[i] == got[i]]
    assert len(same) >= (30 if fp16 else 39)
    worse = {i: exact_score[i] - score[i] for i in exact}
    assert max(abs(worse[i]) for i in same) < (5e-3 if fp16 else 2e-3)
    assert sum(worse.values()) / len(worse) < 0.02


def test_experts_spawn_by_themselves_on_a_plateau(lm_data, tmp_path):
    settings = {**LM, **PLAIN, "moe_spawn_update": "auto", "moe_spawn_window": 2, "moe_spawn_plateau": 0.9}
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    assert len(result.lines("spawned experts")) == 1
