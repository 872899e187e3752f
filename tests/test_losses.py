"""WDR and GPG losses against closed forms: EQ-Net eq. 4-8 and the moments of known distributions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from eqnet.training.losses import guidance_loss, kurtosis, skewness, weight_distribution_loss

TWO_POINT = stats.randint(0, 2)  # 0 and 1 with equal probability


def quantiles(distribution, count: int = 200_000) -> Tensor:
    """A sample without randomness: evenly spaced quantiles of a scipy distribution."""
    return torch.from_numpy(distribution.ppf((np.arange(count) + 0.5) / count))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def total(weights: dict[str, Tensor], **kwargs) -> Tensor:
    parts = weight_distribution_loss(weights, **kwargs)
    return parts["kurtosis"] + parts["skewness"]


@pytest.mark.parametrize(
    ("distribution", "expected", "tolerance"),
    [(stats.uniform(), 1.8, 1e-6), (stats.norm(), 3.0, 0.01), (stats.laplace(), 6.0, 0.05), (TWO_POINT, 1.0, 1e-9)],
)
def test_moments_of_known_distributions(distribution, expected, tolerance):
    sample = quantiles(distribution)
    assert kurtosis(sample).item() == pytest.approx(expected, abs=tolerance)
    assert skewness(sample).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("levels", [2, 4, 16, 256])
def test_kurtosis_of_a_uniform_grid(levels):
    grid = torch.arange(levels, dtype=torch.float64).repeat(10)
    assert kurtosis(grid).item() == pytest.approx(0.6 * (3 * levels**2 - 7) / (levels**2 - 1))
    if levels in (4, 16):
        assert round(kurtosis(grid).item(), 2) == {4: 1.64, 16: 1.79}[levels]


def test_loss_of_uniform_and_gaussian_layers():
    assert total({"a": quantiles(stats.uniform())}).item() == pytest.approx(0, abs=1e-9)
    assert total({"a": quantiles(stats.norm())}).item() == pytest.approx((3 - 1.8) ** 2, abs=0.02)
    assert total({"a": quantiles(stats.norm())}, kurtosis_target=3).item() == pytest.approx(0, abs=1e-4)


def test_moments_are_scipys_over_the_whole_tensor():
    w = normal(8, 3, 3, 3).exp()
    w[0] *= 3  # channels of different width: moments by channel would differ
    assert skewness(w).item() == pytest.approx(stats.skew(w.flatten().numpy()))
    assert kurtosis(w).item() == pytest.approx(stats.kurtosis(w.flatten().numpy(), fisher=False))


def test_loss_is_the_mean_over_layers_of_squared_errors():
    layers = {"a": normal(40).exp(), "b": normal(7, 5, seed=1), "c": quantiles(stats.laplace, 100)}
    parts = weight_distribution_loss(layers)
    flat = [w.flatten().numpy() for w in layers.values()]
    expected = np.mean([(stats.kurtosis(w, fisher=False) - 1.8) ** 2 for w in flat])
    assert parts["kurtosis"].item() == pytest.approx(expected)
    assert parts["skewness"].item() == pytest.approx(np.mean([stats.skew(w) ** 2 for w in flat]))


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.integers(-100, 100), min_size=3, max_size=30).filter(lambda v: len(set(v)) > 1),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
)
def test_shift_and_positive_scale_change_nothing_and_a_negative_scale_flips_skewness(values, scale, shift):
    w = torch.tensor(values, dtype=torch.float64)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(kurtosis(scale * w + shift), kurtosis(w), **close)
    torch.testing.assert_close(skewness(scale * w + shift), skewness(w), **close)
    torch.testing.assert_close(skewness(-scale * w + shift), -skewness(w), **close)
    torch.testing.assert_close(total({"a": -scale * w + shift}), total({"a": w}), rtol=1e-3, atol=1e-3)
    assert kurtosis(w) >= 1 + skewness(w) ** 2 - 1e-9  # Pearson's inequality


def test_gradient_descent_turns_gaussian_weights_into_uniform_ones():
    w = normal(2000, dtype=torch.float32).requires_grad_()
    seen = [kurtosis(w).item()]
    for _ in range(300):
        (gradient,) = torch.autograd.grad(total({"a": w}), w)
        with torch.no_grad():
            w -= 20 * gradient
        seen.append(kurtosis(w).item())
    assert seen[0] == pytest.approx(3, abs=0.3)
    assert all(after <= before + 1e-5 for before, after in itertools.pairwise(seen))
    assert seen[-1] == pytest.approx(1.8, abs=0.02)
    assert abs(skewness(w).item()) < 0.01


@pytest.mark.parametrize("function", [kurtosis, skewness, lambda w: total({"a": w, "b": w.exp()})])
def test_gradients_match_finite_differences(function):
    w = normal(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(function, (w,))


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7e5, 1e-30])
@pytest.mark.parametrize("count", [1, 7, 1000, 12_345])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_constant_weights_have_no_gradient(value, count, dtype):
    w = torch.full((count,), value, dtype=dtype, requires_grad=True)
    other = normal(50).to(dtype).requires_grad_()
    loss = total({"constant": w, "other": other})
    loss.backward()
    assert loss.isfinite()
    assert kurtosis(w).item() == skewness(w).item() == 0
    assert torch.equal(w.grad, torch.zeros_like(w))
    assert other.grad.isfinite().all()
    assert other.grad.abs().sum() > 0


def test_weights_equal_but_for_rounding_count_as_constant():
    w = torch.full((100,), 0.1)
    w[::3] = torch.nextafter(w[0], torch.tensor(1.0))
    w.requires_grad_()
    total({"a": w}).backward()
    assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e-3, 1e15])
def test_float32_is_enough_for_weights_of_any_magnitude(scale):
    w = normal(1000)
    narrow = (w * scale).float().requires_grad_()
    assert kurtosis(narrow).item() == pytest.approx(kurtosis(w).item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(kurtosis(narrow), narrow)
    reference = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(kurtosis(reference), reference)
    torch.testing.assert_close(gradient.double() * scale, expected, rtol=1e-3, atol=1e-6)


def test_narrow_distribution_around_a_large_mean_is_not_constant():
    w = 1 + 1e-3 * normal(1000)
    assert kurtosis(w.float()).item() == pytest.approx(kurtosis(w).item(), rel=1e-2)


def test_diverged_weights_are_not_hidden():
    assert weight_distribution_loss({"a": torch.tensor([1.0, 2.0, float("nan")])})["kurtosis"].isnan()


def test_half_precision_weights_are_measured_in_float32():
    w = normal(4000, dtype=torch.float32).bfloat16().requires_grad_()
    exact = weight_distribution_loss({"a": w.detach().double()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = weight_distribution_loss({"a": w})
    for name in ("kurtosis", "skewness"):
        assert parts[name].dtype == torch.float32
        torch.testing.assert_close(parts[name].double(), exact[name], rtol=1e-4, atol=1e-6)
    parts["kurtosis"].backward()
    assert w.grad.dtype == torch.bfloat16


def test_no_layers_cost_nothing():
    parts = weight_distribution_loss({})
    assert {name: (part.item(), part.device.type) for name, part in parts.items()} == {
        "kurtosis": (0, "cpu"),
        "skewness": (0, "cpu"),
    }


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """KL(teacher || student), mean over images, by scipy."""
    p, q = (torch.softmax(x / temperature, 1).detach().numpy() for x in (teacher, student))
    return float(np.mean([stats.entropy(a, b) for a, b in zip(p, q, strict=True)]))


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_parts_match_the_closed_form(weight, temperature):
    student, teacher, task = normal(6, 5), 3 * normal(6, 5, seed=1), torch.tensor(2.5, dtype=torch.float64)
    parts = guidance_loss(student, teacher, task, weight=weight, temperature=temperature)
    kl = divergence(student, teacher, temperature)
    assert set(parts) == {"guidance", "task", "total"}
    assert parts["guidance"].item() == pytest.approx(kl)
    assert parts["task"].item() == 2.5
    assert parts["total"].item() == pytest.approx(weight * temperature**2 * kl + (1 - weight) * 2.5)


def test_two_classes_by_hand():
    student = torch.zeros(1, 2)
    teacher = torch.tensor([[math.log(3.0), 0.0]])  # probabilities 3/4, 1/4 against 1/2, 1/2
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert guidance_loss(student, teacher, torch.tensor(0.0))["guidance"].item() == pytest.approx(expected)


def test_defaults_are_those_of_the_official_code():
    student, teacher, task = normal(4, 3), normal(4, 3, seed=1), torch.tensor(1.0, dtype=torch.float64)
    expected = 0.5 * divergence(student, teacher, 1.0) + 0.5
    assert guidance_loss(student, teacher, task)["total"].item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equal_predictions_cost_nothing(temperature):
    logits = 5 * normal(7, 10, dtype=torch.float32)
    task = torch.tensor(0.0)
    shifted = logits + 2  # the same distribution
    assert guidance_loss(logits, logits, task, temperature=temperature)["guidance"].item() == 0
    assert guidance_loss(logits, shifted, task, temperature=temperature)["guidance"].item() == pytest.approx(
        0, abs=1e-6
    )


def test_teacher_gets_no_gradient_and_student_the_known_one():
    student, teacher = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    temperature = 2.0
    parts = guidance_loss(student, teacher, torch.tensor(0.0), weight=1.0, temperature=temperature)
    parts["total"].backward()
    assert teacher.grad is None
    difference = torch.softmax(student / temperature, 1) - torch.softmax(teacher / temperature, 1)
    torch.testing.assert_close(student.grad, temperature * difference.detach() / 4)


@pytest.mark.parametrize(("weight", "share"), [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0)])
def test_gradient_of_the_task_has_its_share(weight, share):
    task = torch.tensor(2.0, requires_grad=True)
    guidance_loss(normal(2, 3), normal(2, 3, seed=1), task, weight=weight)["total"].backward()
    assert task.grad.item() == pytest.approx(share)


def test_gradients_of_guidance_match_finite_differences():
    student = normal(3, 4).requires_grad_()
    teacher = normal(3, 4, seed=1)

    def function(logits):
        return guidance_loss(logits, teacher, logits.logsumexp(1).mean(), weight=0.4, temperature=1.7)["total"]

    assert torch.autograd.gradcheck(function, (student,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_compared_in_float32(dtype):
    student, teacher = normal(16, 100).to(dtype), normal(16, 100, seed=1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = guidance_loss(student, teacher, torch.tensor(1.0))
    assert parts["guidance"].dtype == parts["total"].dtype == torch.float32
    assert parts["guidance"].item() == pytest.approx(divergence(student.double(), teacher.double(), 1.0), rel=1e-5)


def test_confident_predictions_stay_finite():
    student = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    parts = guidance_loss(student, -student, torch.tensor(0.0))
    parts["total"].backward()
    assert parts["guidance"].item() == pytest.approx(2000 / 2)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shapes", "kwargs", "message"),
    [
        (((2, 3), (2, 4)), {}, "same shape"),
        (((2, 3), (3,)), {}, "same shape"),
        (((3,), (3,)), {}, "same shape"),
        (((2, 3), (2, 3)), {"weight": 1.5}, "weight"),
        (((2, 3), (2, 3)), {"weight": -0.1}, "weight"),
        (((2, 3), (2, 3)), {"temperature": 0.0}, "temperature"),
        (((2, 3), (2, 3)), {"temperature": float("nan")}, "temperature"),
    ],
)
def test_invalid_arguments_are_refused(shapes, kwargs, message):
    student, teacher = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        guidance_loss(student, teacher, torch.tensor(0.0), **kwargs)
