"""Dense contrast against the official numbers, step after step: matches, losses, gradients, queues, two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gristmill.models.dense import DenseHead
from gristmill.objectives.contrast import streamed_logsumexp
from gristmill.objectives.correspondence import match_features
from gristmill.objectives.dense import DenseConfig, DenseObjective
from gristmill.objectives.protocol import Outcome, StepInfo
from torch import Tensor

VECTORS = Path(__file__).parents[1] / "vectors"
LOSS: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
GRADIENT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def load(name: str) -> dict[str, Any]:
    return torch.load(VECTORS / f"{name}.pt", weights_only=True)


def official_head(state: dict[str, Tensor], encoder: str) -> DenseHead:
    """Our head with the weights of the official 1x1 convolutions."""
    own = {
        key.removeprefix(f"{encoder}.1.mlp2."): w.flatten(1) if w.ndim == 4 else w
        for key, w in state.items()
        if key.startswith(f"{encoder}.1.mlp2.")
    }
    hidden, dim = own["0.weight"].shape
    head = DenseHead(dim, hidden, len(own["2.weight"]))
    head.projector.load_state_dict(own)
    return head


def rows_of(maps: Tensor) -> Tensor:
    """[n, d, h, w] -> [n, h*w, d]."""
    return maps.flatten(2).mT


def objective_of(step: dict[str, Any], meta: dict[str, Any], **config: Any) -> DenseObjective:
    """With the official queue and pointer as they were before the step."""
    objective = DenseObjective(DenseConfig(queue=meta["K"], temperature=meta["T"], **config), meta["dim"], seed=0)
    before = step["state_before"]
    pointer = before["queue2_ptr"][0]
    objective.load(
        {**objective.state(), "queue.rows": before["queue2"].T.contiguous(), "queue.pointer": pointer.clone()}
    )
    return objective


def outputs(head: DenseHead, maps: Tensor) -> dict[str, Tensor]:
    rows, features, pooled = head(rows_of(maps), (maps.shape[2], maps.shape[3]))
    return {"dense": rows, "dense.features": features, "dense.pooled": pooled}


def global_half(step: dict[str, Any], temperature: float) -> tuple[Tensor, Tensor]:
    """MoCo's loss on the recorded raw outputs, and those as a leaf."""
    raw = step["q_global_raw"].clone().requires_grad_()
    query, key = F.normalize(raw, dim=1), F.normalize(step["k_global"], dim=1)
    lse, _ = streamed_logsumexp(query, step["state_before"]["queue"].T.contiguous(), temperature)
    return F.softplus(lse - (query * key).sum(1) / temperature).mean(), raw


@pytest.mark.parametrize("name", ["densecl_loss", "densecl_loss_lambda0", "densecl_r18_slim"])
def test_official_steps(name: str) -> None:
    """Matches, both losses, their sum, gradients, and the queue after each step."""
    vector = load(name)
    meta = vector["meta"]
    share = meta["lam"]
    objective = objective_of(vector["steps"][0], meta)
    for step in vector["steps"]:
        info = StepInfo(batch=4, student_crops=1, student_globals=1, teacher_crops=1)
        student_head = official_head(step["state_before"], "encoder_q")
        # The official key pass comes after the moving average.
        teacher_head = official_head(step["state_after"], "encoder_k")
        maps = step["q_backbone"].clone().requires_grad_()
        student = outputs(student_head, maps)
        with torch.no_grad():
            teacher = outputs(teacher_head, step["k_backbone"])
        raw = step["q_dense_raw"].mT
        torch.testing.assert_close(student["dense"], F.normalize(raw, dim=2), **LOSS)
        torch.testing.assert_close(teacher["dense.pooled"], F.normalize(step["k_densepool"], dim=1), **LOSS)

        matches = match_features(student["dense.features"], teacher["dense.features"])
        assert torch.equal(matches.index, step["ref_match_idx"])
        assert matches.kept.all()
        outcome = objective.loss(student, teacher, info)
        whole, global_raw = global_half(step, meta["T"])
        torch.testing.assert_close(outcome.loss, step["ref_loss_dense_unweighted"], **LOSS)
        torch.testing.assert_close(whole, step["ref_loss_global_unweighted"], **LOSS)
        # What the official code logs has its weight in it already; ours comes before the weight.
        torch.testing.assert_close(share * outcome.loss, step["loss_contra_dense"], **LOSS)
        torch.testing.assert_close((1 - share) * whole, step["loss_contra_single"], **LOSS)
        total = (1 - share) * whole + share * outcome.loss
        torch.testing.assert_close(total, step["loss"], **LOSS)
        assert float(outcome.logs["loss/dense"]) == float(outcome.loss.detach())

        total.backward()
        torch.testing.assert_close(global_raw.grad, step["grad_q_global_raw"], **GRADIENT)
        for key, gradient in step.get("param_grads", {}).items():
            if ".mlp2." in key:
                own = student_head.projector.get_parameter(key.rpartition("mlp2.")[2]).grad
                assert own is not None
                torch.testing.assert_close(own, gradient.flatten(1) if gradient.ndim == 4 else gradient, **GRADIENT)
        objective.commit(outcome)
        torch.testing.assert_close(objective.queue.rows.T, step["state_after"]["queue2"], **LOSS)
        assert objective.queue.pointer == step["state_after"]["queue2_ptr"][0]


@pytest.mark.parametrize("name", ["densecl_loss", "densecl_r18_slim"])
def test_official_gradient_of_the_dense_rows(name: str) -> None:
    """From the recorded raw outputs on, before any head of ours."""
    vector = load(name)
    objective = objective_of(vector["steps"][0], vector["meta"])
    for step in vector["steps"]:
        raw = step["q_dense_raw"].clone().requires_grad_()
        student = {
            "dense": F.normalize(raw, dim=1).mT,
            "dense.features": F.normalize(rows_of(step["q_backbone"]), dim=2),
        }
        teacher = {
            "dense": F.normalize(step["k_dense"], dim=1).mT,
            "dense.features": F.normalize(rows_of(step["k_backbone"]), dim=2),
            "dense.pooled": F.normalize(step["k_densepool"], dim=1),
        }
        outcome = objective.loss(student, teacher, StepInfo(4, 1, 1, 1))
        (vector["meta"]["lam"] * outcome.loss).backward()
        torch.testing.assert_close(outcome.loss, step["ref_loss_dense_unweighted"], **LOSS)
        torch.testing.assert_close(raw.grad, step["grad_q_dense_raw"], **GRADIENT)
        objective.commit(outcome)


def test_official_ranks() -> None:
    """Two ranks of four images: each one's loss, and one queue in the order of the ranks."""
    ranks = [load(f"densecl_ws2_rank{rank}") for rank in range(2)]
    meta = {"K": 24, "T": 0.2, "dim": 8}
    objectives = [objective_of(rank, meta) for rank in ranks]
    outcomes = []
    for rank, objective in zip(ranks, objectives, strict=True):
        head = official_head(rank["state_before"], "encoder_q")
        student = outputs(head, rank["img"][:, 0])
        with torch.no_grad():
            teacher = outputs(official_head(rank["state_after"], "encoder_k"), rank["img"][:, 1])
        outcomes.append(objective.loss(student, teacher, StepInfo(4, 1, 1, 1)))
        torch.testing.assert_close(0.5 * outcomes[-1].loss, rank["loss_contra_dense"], **LOSS)
    rows = torch.cat([outcome.commit["keys"] for outcome in outcomes])
    for rank, objective in zip(ranks, objectives, strict=True):
        objective.commit(Outcome(torch.zeros(()), {}, {"keys": rows}))
        torch.testing.assert_close(objective.queue.rows.T, rank["state_after"]["queue2"], **LOSS)
        assert objective.queue.pointer == rank["state_after"]["queue2_ptr"][0] == 8
    assert torch.equal(objectives[0].queue.rows, objectives[1].queue.rows)
