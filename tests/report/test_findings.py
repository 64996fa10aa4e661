"""What a report says first, in sentences."""

import pytest

from fairseq_evomoe.report.findings import findings, mean_beside_diagonal, percent


def layer(**changes):
    one = {
        "name": "a",
        "experts": ["0", "1", "2", "3"],
        "load": [0.25] * 4,
        "busiest": 1.1,
        "idle": 0,
        "without_expert": 0.0,
        "explained": {"id": 0.5, "position": 0.1, "context": 0.4},
        "domains": None,
        "similarity_of_outputs": [[1, 0.5], [0.5, 1]],
    }
    return {**one, **changes}


def said(*layers, **run):
    return " ".join(findings({"layers": list(layers), **run}))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({}, "The loads are even: the busiest expert gets 1.1 times an even share (a)."),
        ({"busiest": 2.0}, "The loads are uneven"),
        ({"busiest": 3.5}, "Few experts do most of the work"),
        ({"idle": 1}, "1 of 4 experts of a gets no token."),
        ({"idle": 2}, "2 of 4 experts of a get no token."),
        ({"without_expert": 0.25}, "25% of the tokens have no expert in a."),
        ({}, "The token explains 50% of the routing, its place beyond that 10%, what stands around it 40%."),
        ({"explained": {"id": 1.0, "position": 0.0, "context": 0.0}}, "The token alone decides"),
        ({"domains": {"information": 0.034}}, "The domain tells 3.4% of the choice of an expert in a"),
        ({"similarity_of_outputs": [[1, 0.97], [0.97, 1]]}, "almost the same outputs (mean cosine 0.97)"),
    ],
)
def test_sentences_of_layers(changes, sentence):
    assert sentence in said(layer(**changes))


def test_layers_are_taken_together():
    other = layer(name="b", busiest=1.4, explained={"id": 0.7, "position": 0.1, "context": 0.2})
    assert "1.4 times an even share (b)" in said(layer(), other)
    assert "The token explains 50% to 70% of the routing" in said(layer(), other)
    assert said(layer(explained=None), {"name": "before the spawn"}).count("The token") == 0
    assert said({"name": "before the spawn"}) == ""


def test_sentences_of_a_run():
    settled = said(layer(), history=[{"drift": [0.3, 0.004]}, {"drift": [None, None]}])
    assert "The routing has settled: at most 0.4% of it" in settled
    assert "The routing still moves: 12% of it" in said(layer(), history=[{"drift": [0.12]}])
    assert "routing" not in said(layer(explained=None), history=[{"drift": [None]}])
    assert "jumped at update 3, 9." in said(layer(), curves={"spikes": [3, 9]})
    assert "jumped at update 1, 2, 3, 4, 5 and later." in said(layer(), curves={"spikes": list(range(1, 9))})


def test_shares_to_read():
    shares = (0, 0.004, 0.0996, 0.123, 1)
    assert [percent(share) for share in shares] == ["0%", "0.4%", "10%", "12%", "100%"]


def test_the_mean_beside_the_diagonal():
    assert mean_beside_diagonal([[1, 0.2], [0.4, 1]]) == pytest.approx(0.3)
    assert mean_beside_diagonal([[1]]) is None and mean_beside_diagonal(None) is None
