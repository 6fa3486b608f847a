"""What a GPU computes: every precision against the CPU's fp32, and text that is read with a cache and without."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.gpu_check import Skipped
from benchmarks.gpu_rig import CPU, STEPS, Rig, apart, at_least, copied, differing, distance, take_step, within
from benchmarks.measure import Figure
from trainers.config import PrecisionConfig
from trainers.int8_linear import Int8Linear, int8_product
from trainers.models.reading import WindowReader, open_reader
from trainers.precision import autocast
from trainers.rounding import round_stochastically

ROUNDING, HALF_BAND, PURE_BAND, INT8_BAND = 1e-4, 0.01, 0.02, 0.03
"""how far losses may lie from fp32: by the order of sums alone, in bf16 and fp16, with bf16 weights, in int8"""
SEEN = 1e-7  # a reduced precision that moves no loss by as much was not used at all


def fp32_losses(rig: Rig) -> list[Figure]:
    """In fp32 the device has the CPU's losses, but for the order of sums."""
    fallen = rig.reference[-1] / rig.reference[0]
    return [
        within("loss on the CPU after them, of that before: it learns", fallen, 0.9),
        within("first loss, relative difference to the CPU's", apart(rig.plain[:1], rig.reference[:1]), 1e-5),
        within(f"losses of {STEPS} steps, largest relative difference", apart(rig.plain, rig.reference), ROUNDING),
        within("product of matrices, relative error", product_error(rig), 5e-6),
    ]


def tf32_losses(rig: Rig) -> list[Figure]:
    """With precision.tf32 products round their factors to 10 bits, and losses stay within 0.5% of fp32."""
    if not rig.cuda:
        raise Skipped("TF32 is arithmetic of CUDA GPUs")
    if torch.cuda.get_device_capability(rig.device) < (8, 0):
        raise Skipped("TF32 needs compute capability 8.0")
    plain = rig.plain
    losses = rig.losses(rig.config("precision.tf32=true", "device=auto"))
    rounded = product_error(rig)
    rig.losses(rig.config(), steps=1)  # an engine without it takes it back
    return [
        within("losses, largest relative difference to fp32", apart(losses, plain), 5e-3),
        within("product of matrices, relative error", rounded, 2e-3),
        at_least("the same: TF32 was used", rounded, 5e-5),
        within("the same after a run without it", product_error(rig), 5e-6),
    ]


def product_error(rig: Rig) -> float:
    """Of a product of random fp32 matrices, against float64."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator) for _ in range(2))
    return distance(left.to(rig.device) @ right.to(rig.device), left.double() @ right.double())


def bf16_losses(rig: Rig) -> list[Figure]:
    """Losses in bf16 stay within 1% of fp32."""
    if rig.cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Skipped("bf16 needs compute capability 8.0")
    return in_band(rig, rig.losses(rig.config("precision.compute=bf16")), HALF_BAND)


def fp16_losses(rig: Rig) -> list[Figure]:
    """Losses in fp16 with scaling stay within 1% of fp32, and no update is left out."""
    config = rig.config("precision.compute=fp16", "device=auto")  # a run refuses it on the CPU, for its speed alone
    engine = rig.engine(config)
    losses = [float(take_step(engine, rig.batch(step))[0]) for step in range(STEPS)]
    state = engine.state()
    engine.close()
    return [
        *in_band(rig, losses, HALF_BAND),
        within("incidents", state["incidents"]["total"], 0),
        within("overflows", state["scaler"]["overflows"], 0),
    ]


def in_band(rig: Rig, losses: list[float], band: float) -> list[Figure]:
    """Figures of a precision's losses: near to those of fp32, but not the same."""
    difference = apart(losses, rig.plain)
    return [
        within("losses, largest relative difference to fp32", difference, band),
        at_least("the same: it was not computed in fp32", difference, SEEN),
    ]


def fp16_overflow(rig: Rig) -> list[Figure]:
    """An overflow under fp16 leaves the update out, halves the scale and is no incident; the next update counts."""
    engine = rig.engine(rig.config("precision.compute=fp16", "device=auto"))
    take_step(engine, rig.batch(0))
    before, scale = copied(engine), float(engine.scaler.scale)
    take_step(engine, rig.batch(1), factor=1e30)  # finite in fp32, not in fp16
    after, state = copied(engine), engine.state()
    take_step(engine, rig.batch(2))
    moved = differing(after, copied(engine))
    engine.close()
    return [
        within("tensors changed by the update that overflowed", differing(before, after), 0),
        within("distance of the scale from half of what it was", abs(state["scaler"]["scale"] / scale - 0.5), 0),
        within("incidents", state["incidents"]["total"], 0),
        at_least("tensors changed by the next update", moved, 1),
    ]


# ---- int8 -------------------------------------------------------------------------------------------------------


def int8_sums(rig: Rig) -> list[Figure]:
    """Products of int8 codes are exact, however few the rows and whichever way the matrices lie."""
    figures = []
    for rows, terms, columns in ((1, 64, 16), (17, 1024, 24), (64, 4096, 136)):
        generator = torch.Generator().manual_seed(rows)
        left, right = (torch.randint(-127, 128, (n, terms), generator=generator) for n in (rows, columns))
        left[0], right[0] = 127, 127  # the largest sum there is
        exact = (left @ right.t()).float()
        codes = [matrix.to(torch.int8).to(rig.device) for matrix in (left, right)]
        lying = codes[1].t().contiguous().t()  # as the gradient of the input has it
        for how, other in (("", codes[1]), (", transposed", lying)):
            off = float((int8_product(codes[0], other).cpu() - exact).abs().max())
            figures.append(within(f"{rows} x {terms} x {columns}{how}: largest error", off, 0))
    return figures


def int8_layer(rig: Rig) -> list[Figure]:
    """An int8 layer gives output and gradients of the CPU's, which differ from those of full precision."""
    ours, theirs = (_layer_results(device, Int8Linear) for device in (rig.device, CPU))
    exact = _layer_results(CPU, nn.Linear)
    names = ("output", "gradient of the input", "gradient of the weight")
    figures = [within(f"{name}: to the CPU's", distance(ours[name], theirs[name]), 1e-5) for name in names]
    return [*figures, at_least("output: to that of fp32", distance(ours["output"], exact["output"]), 1e-4)]


def _layer_results(device: torch.device, kind: type[nn.Linear]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(128, 96)
    layer.__class__ = kind
    inputs, direction = torch.randn(4, 16, 128), torch.randn(4, 16, 96)
    layer, inputs = layer.to(device), inputs.to(device).requires_grad_()
    output = layer(inputs)
    output.backward(direction.to(device))
    assert inputs.grad is not None and layer.weight.grad is not None
    return {
        "output": output.detach(),
        "gradient of the input": inputs.grad,
        "gradient of the weight": layer.weight.grad,
    }


def int8_losses(rig: Rig) -> list[Figure]:
    """Training with int8 products has the CPU's losses in fp32, and in bf16 stays within 3% of fp32."""
    settings = ("precision.weights=int8",)
    ours = rig.losses(rig.config(*settings))
    theirs = rig.losses(rig.config(*settings, "device=cpu"), device=CPU)
    named = rig.losses(rig.config(*settings, "precision.compute=bf16"))
    return [
        within("fp32: first loss, to the CPU's", apart(ours[:1], theirs[:1]), 1e-4),
        within("fp32: losses, to the CPU's", apart(ours, theirs), HALF_BAND),  # a code that flips is no rounding error
        *in_band(rig, ours, INT8_BAND),
        within("bf16: losses, largest relative difference to fp32", apart(named, rig.plain), INT8_BAND),
    ]


# ---- bf16 weights -----------------------------------------------------------------------------------------------


def stochastic_rounding(rig: Rig) -> list[Figure]:
    """Rounding to bf16 on the device is right on average, and leaves alone what bf16 holds."""
    count, low, step = 1 << 20, 1.0, 1 / 128
    generator = torch.Generator(device=rig.device).manual_seed(0)
    figures = []
    for share in (0.25, 0.5, 0.9):
        values = torch.full((count,), low + share * step, device=rig.device)
        rounded = round_stochastically(values, generator).float()
        strangers = int(((rounded != low) & (rounded != low + step)).sum())
        sigma = step * (share * (1 - share) / count) ** 0.5
        off = abs(float(rounded.double().mean()) - float(values[0].double())) / sigma
        figures.append(within(f"{share:g} of the way: mean off by (standard errors)", off, 5))
        figures.append(within(f"{share:g} of the way: results that are no neighbours", strangers, 0))
    held = torch.randn(4096, generator=generator, device=rig.device).bfloat16()
    kept = differing({"held": held}, {"held": round_stochastically(held.float(), generator)})
    return [*figures, within("values of bf16 that were moved", kept, 0)]


def bf16_weights(rig: Rig) -> list[Figure]:
    """bf16 weights train within 2% of fp32, and updates far below their last bit add up."""
    if rig.cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Skipped("bf16 needs compute capability 8.0")
    settings = ("precision.compute=bf16", "precision.bf16_weights=true")
    losses = rig.losses(rig.config(*settings))
    return [*in_band(rig, losses, PURE_BAND), *_small_updates(rig, *settings)]


def _small_updates(rig: Rig, *settings: str) -> list[Figure]:
    """Forty updates of 1e-4 each on weights of 1, whose neighbours are 4e-3 and 8e-3 away."""
    engine = rig.engine(rig.config(*settings, "optim.weight_decay=0", "optim.clip_norm=null"))
    weight = next(parameter for parameter in engine.module.parameters() if parameter.dim() == 2)
    with torch.no_grad():
        weight.fill_(1.0)
    for _ in range(40):
        weight.grad = torch.ones_like(weight)
        engine.update(1e-4)
    moved = 1 - float(weight.detach().double().mean())
    engine.close()
    return [within("forty updates of 1e-4: share of them lost", abs(moved / 40e-4 - 1), 0.05)]


# ---- reading ----------------------------------------------------------------------------------------------------


def cached_reading(rig: Rig) -> list[Figure]:
    """Logits of a text read token by token with the cache are those of reading it whole, past the window's end too."""
    model = rig.model(rig.config()).eval()
    return [
        within("fp32: largest difference in standard deviations", _reading_apart(rig, model, "fp32"), 1e-3),
        within("bf16: the same", _reading_apart(rig, model, "bf16"), 0.2),
    ]


@torch.no_grad()
def _reading_apart(rig: Rig, model: nn.Module, compute: str) -> float:
    length, vocabulary = rig.shape.length, rig.shape.vocabulary
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    prompts = [draw(length - 12), draw(3), draw(length // 2)]
    readers = open_reader(model, len(prompts)), WindowReader(model, len(prompts))  # type: ignore[arg-type]
    worst, new = 0.0, prompts
    precision = PrecisionConfig(compute=compute)
    with autocast(precision, rig.device):
        for _ in range(16):  # the first row's window moves after 12
            cached, whole = (reader.read(new).float() for reader in readers)
            worst = max(worst, float((cached - whole).abs().max() / whole.std()))
            new = [draw(1) for _ in prompts]
    return worst


ARITHMETIC: tuple[Callable[[Rig], list[Figure]], ...] = (
    *(fp32_losses, tf32_losses, bf16_losses, fp16_losses, fp16_overflow),
    *(int8_sums, int8_layer, int8_losses, stochastic_rounding, bf16_weights, cached_reading),
)
