"""The quantiser against a plain float64 reference written as loops, and its training-time behaviour."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nextflow_ar.config import QuantizerConfig
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.tokenizer import quantizer as module
from nextflow_ar.tokenizer.quantizer import MultiScaleQuantizer, SelfCorrection, resize

CONFIG = QuantizerConfig(
    codebook_size=40, semantic_dim=3, pixel_dim=5, semantic_weight=2.0, normalize=False, refine=0.0
)


def quantizer(config: QuantizerConfig = CONFIG, seed: int = 0, scales: int = 5) -> MultiScaleQuantizer:
    q = MultiScaleQuantizer(config, scales)
    q.codebook.normal_(0, 0.7, generator=torch.Generator().manual_seed(seed))
    return q


def features(schedule: ScaleSchedule, rows: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 8, *schedule.final, generator=torch.Generator().manual_seed(seed))


def cubic(x: float) -> float:
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def bicubic_matrix(source: int, target: int) -> np.ndarray:
    out = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            out[i, min(max(tap, 0), source - 1)] += cubic(centre - tap)
    return out


def area_matrix(source: int, target: int) -> np.ndarray:
    """Adaptive average: cell i covers source cells floor(i s / t) to ceil((i + 1) s / t)."""
    out = np.zeros((target, source))
    for i in range(target):
        first, last = i * source // target, -(-(i + 1) * source // target)
        out[i, first:last] = 1 / (last - first)
    return out


def reference(
    x: np.ndarray, codebook: np.ndarray, config: QuantizerConfig, schedule: ScaleSchedule
) -> list[int]:
    """Codes of one (C, H, W) feature map, in float64."""
    halves = (slice(0, config.semantic_dim), slice(config.semantic_dim, None))
    weights = (config.semantic_weight, 1.0)

    def key(v: np.ndarray, half: slice) -> np.ndarray:
        return v[half] / max(np.linalg.norm(v[half]), 1e-12) if config.normalize else v[half]

    rest, codes, height, width = x.astype(np.float64).copy(), [], *schedule.final
    for h, w in schedule:
        small = np.einsum("ih,chw,jw->cij", area_matrix(height, h), rest, area_matrix(width, w))
        chosen = np.zeros((x.shape[0], h, w))
        for i in range(h):
            for j in range(w):
                distances = [
                    sum(
                        g * ((key(small[:, i, j], p) - key(code, p)) ** 2).sum()
                        for g, p in zip(weights, halves, strict=True)
                    )
                    for code in codebook
                ]
                codes.append(int(np.argmin(distances)))
                chosen[:, i, j] = codebook[codes[-1]]
        rest -= np.einsum("hi,cij,wj->chw", bicubic_matrix(h, height), chosen, bicubic_matrix(w, width))
    return codes


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("final", [(64, 64), (40, 100), (128, 32)], ids=str)
def test_codes_equal_the_float64_reference(final: tuple[int, int], normalize: bool) -> None:
    config = replace(CONFIG, normalize=normalize)
    q, schedule = quantizer(config), ScaleSchedule.from_final(final, 5)
    x = features(schedule)
    found = q.quantize(x, schedule)
    for row in range(2):
        wanted = reference(x[row].numpy(), q.codebook.double().numpy(), config, schedule)
        assert found.target[row].tolist() == wanted
    assert torch.equal(found.input, found.target)
    torch.testing.assert_close(q.accumulate(found.target, schedule), found.features)
    errors = ((x - q.accumulate(found.target, schedule)) ** 2).mean()
    assert float(found.prefix_errors[-1]) == pytest.approx(float(errors), rel=1e-4)


@pytest.mark.parametrize(("source", "target"), [(1, 8), (3, 8), (5, 8), (7, 8), (2, 5)])
def test_resizing_equals_torchs(source: int, target: int) -> None:
    x = torch.randn(2, 3, source, source)
    torch.testing.assert_close(
        resize(x, (target, target), "bicubic"),
        F.interpolate(x, size=(target, target), mode="bicubic"),
        atol=1e-5,
        rtol=1e-5,
    )
    y = torch.randn(2, 3, target, target)
    torch.testing.assert_close(
        resize(y, (source, source), "area"), F.interpolate(y, size=(source, source), mode="area")
    )


def test_scales_accumulate_prefix_by_prefix() -> None:
    q, schedule = quantizer(), ScaleSchedule.square(5)
    codes = q.quantize(features(schedule), schedule).target
    assert float(q.accumulate(codes, schedule, 0).abs().sum()) == 0
    one = q.accumulate(codes, schedule, 1)
    torch.testing.assert_close(one, q.codebook[codes[:, 0]][:, :, None, None].expand_as(one))
    mask = torch.arange(5) < torch.tensor([[2], [5]])
    dropped = q.quantize(features(schedule), schedule, mask=mask)
    torch.testing.assert_close(dropped.features[0], q.accumulate(codes, schedule, 2)[0])
    torch.testing.assert_close(dropped.features[1], q.accumulate(codes, schedule)[1])
    assert torch.equal(dropped.target, codes)


def test_it_computes_in_fp32_under_autocast() -> None:
    q, schedule = quantizer(), ScaleSchedule.square(5)
    x = features(schedule, rows=4)
    plain = q.quantize(x, schedule)
    with torch.autocast("cpu", torch.bfloat16):
        cast = q.quantize(x, schedule)
    assert cast.features.dtype == torch.float32
    assert torch.equal(cast.target, plain.target)
    assert torch.equal(cast.features, plain.features)


def test_chunked_distances_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    q, schedule = quantizer(), ScaleSchedule.square(5)
    x = features(schedule, rows=3)
    whole = q.quantize(x, schedule)
    monkeypatch.setitem(module._DISTANCE_BUDGET, "cpu", 7 * 40)
    assert torch.equal(q.quantize(x, schedule).target, whole.target)


def test_self_correction_answers_its_own_history() -> None:
    q, schedule = quantizer(), ScaleSchedule.square(5)
    x = features(schedule, rows=64)
    plain = q.quantize(x, schedule)
    correction = SelfCorrection(share=0.6, top_k=5, temperature=5.0)
    found = q.quantize(x, schedule, correction=correction, generator=torch.Generator().manual_seed(3))
    again = q.quantize(x, schedule, correction=correction, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found.input, again.input) and torch.equal(found.target, again.target)
    changed = (found.input != found.target).float()
    assert 0.3 < float(changed.mean()) < 0.6  # 60 % are drawn, some of them the nearest again
    assert torch.equal(found.target[:, 0], plain.target[:, 0])  # nothing was corrupted before grid 1
    assert not torch.equal(found.target, plain.target)
    # what is subtracted is the sampled code: targets are the nearest codes given the *input* history
    for k in range(1, 5):
        rest = x - q.accumulate(found.input, schedule, k)
        cells = resize(rest, schedule.grids[k], "area").flatten(2).transpose(1, 2).reshape(-1, 8)
        wanted = q.nearest(cells).view(64, -1)
        same = wanted == found.target[:, schedule.offsets[k] : schedule.offsets[k + 1]]
        assert float(same.float().mean()) > 0.999
    near = q.distances(x.mean((2, 3))).topk(5, largest=False).indices
    assert bool((near == found.input[:, :1]).any(1).all())  # sampled among the five nearest
    none = q.quantize(x, schedule, correction=SelfCorrection(0.0, 5, 1.0))
    assert torch.equal(none.input, plain.input)


def test_learning_moves_codes_to_their_cells_and_revives_the_dead() -> None:
    torch.manual_seed(0)
    q, schedule = quantizer(), ScaleSchedule.square(5)
    q.codebook.zero_()  # total collapse
    generator = torch.Generator().manual_seed(0)
    errors, revived = [], []
    for step in range(60):
        x = features(schedule, rows=16, seed=step)
        trace: list = []
        errors.append(float(q.quantize(x, schedule, trace=trace).prefix_errors[-1]))
        revived.append(q.learn(trace, decay=0.9, revive_below=0.05, generator=generator))
    assert revived[0] == 39
    assert np.mean(errors[-5:]) < 0.75 * errors[0]
    usage, perplexity = q.usage()
    assert usage.shape == perplexity.shape == (5,)
    assert float(usage[1:].min()) > 0.8 and float(perplexity[1:].min()) > 12


def cells_of(codes: list[int], at: torch.Tensor) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """A trace of one scale whose cells, all of them ``at``, are given these codes."""
    return [(0, at.expand(len(codes), 8), torch.tensor(codes))]


def test_a_trained_codebook_goes_on_from_where_it_is() -> None:
    """Its moving averages are not saved with it: it was each code's mean of the first batch that took its place."""
    q, at = quantizer(scales=1), torch.ones(8)
    before = q.codebook.clone()
    q.keep_trained()
    met = [i for i in range(40) if i % 2] * 8  # 4 cells per code of the codebook, none for half of it
    assert q.learn(cells_of(met, at), decay=0.99, revive_below=0.02) == 0
    torch.testing.assert_close(q.codebook[::2], before[::2])
    # Twice the average count: the share of this batch in the code is twice 1 - decay, over what both make together.
    torch.testing.assert_close(
        q.codebook[1::2], before[1::2] + (at - before[1::2]) * 0.08 / (0.99 * 4 + 0.08)
    )
    for _ in range(540):  # 4 * 0.99 ** n falls below 0.02 after 527 steps
        revived = q.learn(cells_of(met, at), decay=0.99, revive_below=0.02)
        if revived:
            break
    assert revived == 20 and float(q.ema_count[1::2].min()) > 7  # type: ignore[possibly-undefined]
    rare = quantizer(scales=1)
    rare.keep_trained()
    assert rare.learn(cells_of([3], at), decay=0.5, revive_below=0.4) == 0  # 1/40 a code: as a revived one, 1


def test_a_code_met_in_the_first_step_is_not_dead() -> None:
    """The moving count of a code that one cell was given is 0.01 then; its mean count is 1."""
    q = quantizer(scales=1)
    met = list(range(0, 40, 2))
    assert q.learn(cells_of(met, torch.ones(8)), decay=0.99, revive_below=0.02) == 20
    assert q.ema_weight == pytest.approx(0.01)
    torch.testing.assert_close(q.ema_count[::2], torch.full((20,), 0.01))
    for _ in range(2000):
        q.learn(cells_of(met, torch.ones(8)), decay=0.99, revive_below=0.0)
    assert q.ema_weight == pytest.approx(1.0, abs=1e-8)


def test_usage_counts_by_hand() -> None:
    q = quantizer(scales=1)
    cells = torch.zeros(4, 8)
    q.learn([(0, cells, torch.tensor([0, 0, 1, 1]))], decay=0.0, revive_below=0.0)
    usage, perplexity = q.usage()
    assert float(usage[0]) == pytest.approx(2 / 40)
    assert float(perplexity[0]) == pytest.approx(2.0, rel=1e-4)


def test_a_masked_scale_may_be_left_out_of_the_chain() -> None:
    q, schedule = quantizer(), ScaleSchedule.square(5)
    x = features(schedule)
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    found = q.quantize(x, schedule, mask=mask, skip=True)
    plain = q.quantize(x, schedule)
    assert torch.equal(found.target[1], plain.target[1])
    assert torch.equal(found.target[0, :5], plain.target[0, :5])  # the first two scales see the same residual
    rest = x[:1] - q.accumulate(found.target[:1], schedule, 1)  # the second scale is not subtracted
    cells = resize(rest, schedule.grids[2], "area").flatten(2).transpose(1, 2)[0]
    assert q.nearest(cells).tolist() == found.target[0, 5:14].tolist()
    torch.testing.assert_close(found.features, q.accumulate(found.target, schedule, mask=mask))


def test_a_codebook_may_learn_by_gradient() -> None:
    q, schedule = quantizer(), ScaleSchedule.square(5)
    names = set(q.state_dict())
    q.learn_by_gradient()
    q.learn_by_gradient()  # twice is once
    assert set(q.state_dict()) == names and isinstance(q.codebook, torch.nn.Parameter)
    optimizer = torch.optim.Adam([q.codebook], lr=0.05)
    losses = []
    for step in range(30):
        x = features(schedule, rows=8, seed=step)
        trace: list = []
        codes = q.quantize(x, schedule, trace=trace).target
        before = q.codebook.detach().clone()
        q.learn(trace, decay=0.9, revive_below=0.0)
        assert torch.equal(q.codebook, before)  # counted, not moved
        loss = F.mse_loss(q.accumulate(codes, schedule), x)
        optimizer.zero_grad()
        loss.backward()
        assert q.codebook.grad is not None
        assert not bool(q.codebook.grad[torch.bincount(codes.flatten(), minlength=40) == 0].any())
        optimizer.step()
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.9 * losses[0]


def test_vars_convolutions_are_the_identity_where_they_have_no_share() -> None:
    schedule = ScaleSchedule.square(5)
    torch.manual_seed(0)
    q = quantizer(replace(CONFIG, refine=0.5))
    assert q.refiner is not None
    codes = q.quantize(features(schedule), schedule).target
    refined = q.accumulate(codes, schedule)
    x = resize(q.codebook[codes[:, :1]].transpose(1, 2).unflatten(2, (1, 1)), schedule.final, "bicubic")
    torch.testing.assert_close(q.accumulate(codes, schedule, 1), 0.5 * x + 0.5 * q.refiner.convolutions[0](x))
    q.refiner.share = 0.0
    plain = quantizer()
    torch.testing.assert_close(q.accumulate(codes, schedule), plain.accumulate(codes, schedule))
    assert not torch.allclose(refined, plain.accumulate(codes, schedule))


def test_the_entropy_term_rewards_clear_and_varied_choices() -> None:
    q, schedule = quantizer(), ScaleSchedule.square(1)
    exact = q.codebook[:16].view(16, 8, 1, 1)  # every cell lies on a code of its own
    same = q.codebook[:1].expand(16, 8).reshape(16, 8, 1, 1)
    blurred = (q.codebook.mean(0).expand(16, 8) + 1e-3).reshape(16, 8, 1, 1)
    values = []
    for x in (exact, same, blurred):
        x = x.clone().requires_grad_(True)
        codes = q.quantize(x, schedule).target
        value = q.uncertainty(x, codes, schedule, temperature=0.1)
        value.backward()
        assert x.grad is not None and bool(x.grad.isfinite().all())
        values.append(float(value))
    assert values[0] < -2 and values[0] < values[1] and values[0] < values[2]  # about -log 16


def test_a_codebook_without_a_semantic_half() -> None:
    config = replace(CONFIG, semantic_dim=0, pixel_dim=8, normalize=True)
    q, schedule = quantizer(config), ScaleSchedule.square(5)
    x = features(schedule)
    found = q.quantize(x, schedule).target[0].tolist()
    assert found == reference(x[0].numpy(), q.codebook.double().numpy(), config, schedule)


@pytest.mark.parametrize("size", [16_384, 32_768])
def test_memory_stays_flat_in_the_number_of_codes(size: int) -> None:
    """At 1024 px a scale has 4,096 cells: no (cells, codes) matrix larger than the budget may ever exist."""
    config = QuantizerConfig(size, 8, 8, 1.0, False, 0.0)
    q = MultiScaleQuantizer(config)
    q.codebook.normal_(generator=torch.Generator().manual_seed(0))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    cells = torch.randn(4096, 16)
    with Watch():
        q.nearest(cells)
        q.sample_nearest(cells, SelfCorrection(1.0, 4, 1.0), torch.Generator().manual_seed(0))
    assert largest <= max(module._DISTANCE_BUDGET["cpu"], size * 16)
    assert largest < 4096 * size


def _learn_in_two(rank: int, port: int, out: str) -> None:
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    from nextflow_ar.training.parallel import World

    torch.set_num_threads(1)
    world, q, schedule = World.join(), quantizer(), ScaleSchedule.square(3)
    q.ema_count.fill_(1.0)
    q.ema_sum.copy_(q.codebook)
    for step in range(4):
        trace: list = []
        q.quantize(features(schedule, rows=4, seed=10 * step + rank), schedule, trace=trace)
        generator = torch.Generator().manual_seed(step + 7 * rank)
        q.learn(
            trace, decay=0.9, revive_below=0.7 if step == 3 else 0.0, generator=generator, add=world.add,
            share=world.share,
        )  # fmt: skip
        if step == 2:
            torch.save(q.codebook.clone(), f"{out}/before{rank}.pt")
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.full((1, 2), float(rank))
    world.average_gradients(layer.parameters())
    torch.save((q.codebook, q.scale_counts, layer.weight.grad), f"{out}/after{rank}.pt")
    world.leave()


@pytest.mark.slow
def test_two_processes_learn_one_codebook(tmp_path) -> None:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_learn_in_two, (port, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"after{i}.pt") for i in range(2))
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
    assert a[2].tolist() == [[0.5, 0.5]]
    # the same as one process that sees both batches
    q, schedule = quantizer(), ScaleSchedule.square(3)
    q.ema_count.fill_(1.0)
    q.ema_sum.copy_(q.codebook)
    for step in range(3):
        trace: list = []
        both = torch.cat([features(schedule, rows=4, seed=10 * step + rank) for rank in range(2)])
        q.quantize(both, schedule, trace=trace)
        q.learn(trace, decay=0.9, revive_below=0.0)
    torch.testing.assert_close(torch.load(tmp_path / "before0.pt"), q.codebook, atol=1e-5, rtol=1e-5)
