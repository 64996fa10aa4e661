"""What a saved router tells of the options that it was made with, for the refusal that names them."""

import pytest
import torch

from fairseq_evomoe.moe import ROUTERS, RoutingContext, Vocabulary
from fairseq_evomoe.moe.balancing import Balance
from fairseq_evomoe.moe.routers.router import GateInput

VOCABULARY = Vocabulary(17, torch.ones(17), dim=3)
PLAIN = {"balance": Balance.loss, "constant_experts": 0}
LINEAR = ["dts", "switch", "topk", "top-p"]


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("gate_input", [kind.value for kind in GateInput])
def test_the_input_of_a_linear_gate(name, gate_input):
    router = ROUTERS[name](6, 4, vocabulary=VOCABULARY, gate_input=gate_input)
    found = ROUTERS[name].options_of_state(router.state_dict(), VOCABULARY)
    assert found == {"gate_input": GateInput(gate_input), **PLAIN}
    again = ROUTERS[name](6, 4, vocabulary=VOCABULARY, **found)
    assert again.state_dict().keys() == router.state_dict().keys()
    again.load_state_dict(router.state_dict())


@pytest.mark.parametrize("gate_input", ["token", "table"])
def test_without_a_vocabulary_a_table_looks_like_embeddings(gate_input):
    state = ROUTERS["dts"](6, 4, vocabulary=VOCABULARY, gate_input=gate_input).state_dict()
    assert ROUTERS["dts"].options_of_state(state) == PLAIN


def test_a_state_without_the_part_that_sees_tokens_is_that_of_both_with_zeros():
    """From before gates saw tokens: it loads into both, and tells that it is hidden."""
    hidden = ROUTERS["switch"](6, 4).double().eval()
    hidden.initialize(torch.Generator().manual_seed(0))
    both = ROUTERS["switch"](6, 4, vocabulary=VOCABULARY, gate_input="both").double().eval()
    both.load_state_dict(hidden.state_dict())
    x = torch.randn(5, 6, dtype=torch.float64)
    context = RoutingContext(embedding_TC=torch.randn(5, 3))
    assert torch.equal(both(x, context).weight_N, hidden(x, context).weight_N)
    found = ROUTERS["switch"].options_of_state(hidden.state_dict())
    assert found == {"gate_input": GateInput.hidden, **PLAIN}


@pytest.mark.parametrize("name", LINEAR)
def test_whether_a_bias_keeps_the_loads_even(name):
    state = ROUTERS[name](6, 4, balance="quantile").state_dict()
    assert ROUTERS[name].options_of_state(state)["balance"] == Balance.bias
    ROUTERS[name](6, 4, balance="bias").load_state_dict(state)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in LINEAR])
def test_other_routers_claim_no_option_that_they_do_not_have(name):
    router = ROUTERS[name](6, 4, vocabulary=VOCABULARY)
    found = ROUTERS[name].options_of_state(router.state_dict(), VOCABULARY)
    assert found.keys() <= ROUTERS[name].Options.declared().keys()
    assert ROUTERS[name].options_of_state({}) == {}
