"""Laws of the GPT: causality, position schemes, norms, initial weights, caching, checkpointing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.config import ModelConfig
from trainers.errors import ConfigError
from trainers.models import GPT, apply_switches, build_model, parameter_count
from trainers.models.norms import deepnorm_alpha, deepnorm_beta
from trainers.models.positions import Rotary
from trainers.models.reading import CachedReader, window_start

VOCAB = 50
SMALL = {"d_model": 32, "n_heads": 4, "n_layers": 3, "context_length": 12, "dropout": 0.0}
ARCHITECTURES = {
    "fundamentallm": {"norm": "rmsnorm", "positions": "learned"},
    "fundamentallm-sinusoidal": {"norm": "rmsnorm", "positions": "sinusoidal"},
    "codelm": {"norm": "layernorm", "positions": "learned"},
    "codelm-rope": {"norm": "rmsnorm", "positions": "rope"},
    "microscope": {"positions": "rope_interleaved", "activation": "swiglu", "bias": False, "final_norm": "rmsnorm"},
    "deep_narrow": {
        "norm": "deepnorm",
        "norm_position": "post",
        "positions": "rope_interleaved",
        "activation": "swiglu",
        "bias": False,
        "final_norm": "rmsnorm",
    },
    "post": {"norm": "layernorm", "norm_position": "post", "positions": "sinusoidal", "final_norm": "none"},
    "untied": {"tie_embeddings": False, "positions": "rope"},
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def config(name: str = "fundamentallm", **changes: object) -> ModelConfig:
    return ModelConfig.model_validate(SMALL | ARCHITECTURES[name] | changes)


def model(name: str = "fundamentallm", seed: int = 1, vocab_size: int = VOCAB, **changes: object) -> GPT:
    torch.manual_seed(seed)
    return build_model(config(name, **changes), vocab_size)


def spread(model: GPT) -> GPT:
    """The model in float64 with weights large enough that every part of it shows in the logits."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, inputs: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs)[0][:, :-1].flatten(0, 1), inputs[:, 1:].flatten())


# ---- structure ----------------------------------------------------------------------------------------


@every_architecture
def test_a_later_token_never_changes_an_earlier_logit(name: str) -> None:
    gpt = spread(model(name))
    inputs = tokens()
    changed = inputs.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    before, after = gpt(inputs)[0], gpt(changed)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).gt(1e-6).all()  # the control: later ones do change


@every_architecture
def test_cached_and_uncached_logits_agree_past_the_context_length(name: str) -> None:
    gpt = spread(model(name)).eval()
    text = tokens(1, 40)[0].tolist()
    reader = CachedReader(gpt, 1)
    with torch.no_grad():
        for length in range(1, 41):
            cached = reader.read([text[length - 1 : length]])[0]
            window = text[window_start(length, gpt.context_length) : length]
            torch.testing.assert_close(cached, gpt(torch.tensor([window]))[0][0, -1], rtol=0, atol=1e-10)


def test_a_cache_that_remembers_too_little_is_seen() -> None:
    gpt = spread(model()).eval()
    inputs = tokens(1, 6)
    cache = gpt.new_cache(1)
    with torch.no_grad():
        gpt.decode(inputs[:, :5], cache)
        assert cache.length == 5
        cache.drop()
        assert cache.length == 0
        assert (gpt.decode(inputs[:, 5:], cache) - gpt(inputs)[0][:, -1]).abs().max() > 1e-3


def test_rows_of_unequal_length_share_a_cache() -> None:
    gpt = spread(model("codelm-rope")).eval()
    rows = [tokens(1, length, seed=length)[0].tolist() for length in (3, 12, 7, 30)]
    together = CachedReader(gpt, 4)
    alone = [CachedReader(gpt, 1) for _ in rows]
    with torch.no_grad():
        for new in [rows, *([[[step + row] for row in range(4)] for step in range(15)])]:
            singles = torch.cat([reader.read([part]) for reader, part in zip(alone, new, strict=True)])
            torch.testing.assert_close(together.read(new), singles, rtol=0, atol=1e-10)


def test_a_row_longer_than_the_context_is_refused_by_the_cache() -> None:
    gpt = model()
    cache = gpt.new_cache(1)
    gpt.decode(tokens(1, 12), cache)
    with pytest.raises(ValueError, match=r"13 tokens.*context_length \(12\)"):
        gpt.decode(tokens(1, 1), cache)


@pytest.mark.parametrize("context_length", [1, 2, 5, 8])
def test_the_window_always_fits_and_keeps_half(context_length: int) -> None:
    for length in range(1, 60):
        width = length - window_start(length, context_length)
        assert width <= context_length
        assert width == length or width > context_length // 2 or context_length == 1


def test_prenorm_layernorm_gelu_equals_torchs_encoder_layer() -> None:
    gpt = spread(model("codelm", n_layers=1))
    block = gpt.blocks[0]
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True).double()
    copies = {
        "self_attn.in_proj_weight": block.attention.qkv.weight,
        "self_attn.in_proj_bias": block.attention.qkv.bias,
        "self_attn.out_proj.weight": block.attention.out.weight,
        "self_attn.out_proj.bias": block.attention.out.bias,
        "linear1.weight": block.ffn.up.weight,
        "linear1.bias": block.ffn.up.bias,
        "linear2.weight": block.ffn.down.weight,
        "linear2.bias": block.ffn.down.bias,
        "norm1.weight": block.attention_norm.weight,
        "norm1.bias": block.attention_norm.bias,
        "norm2.weight": block.ffn_norm.weight,
        "norm2.bias": block.ffn_norm.bias,
    }
    theirs.load_state_dict(copies)
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(12, dtype=torch.float64)
    expected = theirs(x, src_mask=mask, is_causal=True)
    torch.testing.assert_close(block(x, lambda heads: heads), expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        theirs.linear1.weight[0, 0] += 0.1  # the control: one weight less alike
    assert (theirs(x, src_mask=mask, is_causal=True) - expected).abs().max() > 1e-6


def test_hidden_states_and_head_make_the_logits() -> None:
    for name in ("fundamentallm", "untied"):
        gpt = spread(model(name))
        head = gpt.embedding.weight if gpt.head is None else gpt.head.weight
        torch.testing.assert_close(gpt(tokens())[0], gpt.hidden(tokens()) @ head.T, rtol=0, atol=1e-10)
    assert gpt.initial_state(3) is None


def test_a_tied_matrix_stands_once_in_the_state_dict() -> None:
    gpt = model()
    assert not any("head" in name for name in gpt.state_dict())
    gpt(tokens())[0].sum().backward()
    storages = [tensor.data_ptr() for tensor in gpt.state_dict().values()]
    assert len(set(storages)) == len(storages)
    assert "head.weight" in model("untied").state_dict()


# ---- positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_scores_depend_on_distance_alone(interleaved: bool) -> None:
    rotary = Rotary(64, 8, 10_000.0, interleaved=interleaved).double()
    torch.manual_seed(0)
    query, key = torch.randn(2, 8, dtype=torch.float64)

    def score(at_query: int, at_key: int) -> float:
        pair = torch.stack((query, key)).view(1, 2, 1, 1, 8)
        rotated = rotary.at(torch.tensor([[at_query, at_key]]))(pair).view(2, 8)
        return float(rotated[0] @ rotated[1])

    assert score(9, 4) == pytest.approx(score(45, 40), abs=1e-6)  # the tables are float32
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
    assert rotary.at(torch.tensor([[0]]))(query.view(1, 1, 1, 1, 8)).view(8) == pytest.approx(query)


def test_half_split_and_interleaved_are_one_rotation_of_permuted_features() -> None:
    half, inter = (Rotary(16, 8, 10_000.0, interleaved=flag).double() for flag in (False, True))
    x = torch.randn(2, 16, 2, 3, 8, dtype=torch.float64)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # interleaved place 2i holds feature i, 2i + 1 holds i + 4
    assert torch.allclose(half.first(16)(x)[..., order], inter.first(16)(x[..., order]), rtol=0, atol=1e-12)
    assert not torch.allclose(half.first(16)(x), inter.first(16)(x))


def test_rope_models_have_no_position_table() -> None:
    learned, rope = config("fundamentallm"), config("fundamentallm", positions="rope")
    assert parameter_count(learned, VOCAB) - parameter_count(rope, VOCAB) == 12 * 32
    assert parameter_count(config("fundamentallm-sinusoidal"), VOCAB) == parameter_count(rope, VOCAB)
    assert not any("positions" in name for name in model("codelm-rope").state_dict())


def test_sinusoids_follow_the_formula_beside_scaled_embeddings() -> None:
    gpt = model("fundamentallm-sinusoidal").double()
    table = gpt.positions.weight
    assert table[5, 0].item() == pytest.approx(math.sin(5))
    assert table[5, 1].item() == pytest.approx(math.cos(5))
    assert table[7, 10].item() == pytest.approx(math.sin(7 / 10_000 ** (10 / 32)))
    assert table[7, 11].item() == pytest.approx(math.cos(7 / 10_000 ** (10 / 32)))
    expected = gpt.embedding.weight[tokens()] * math.sqrt(32) + table
    torch.testing.assert_close(gpt._embed(tokens(), table), expected)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "rope_interleaved"])
def test_order_matters_under_every_scheme(positions: str) -> None:
    gpt = spread(model(positions=positions))
    inputs = tokens(1, 6)
    swapped = inputs[:, [1, 0, 2, 3, 4, 5]]
    assert (gpt(inputs)[0][:, -1] - gpt(swapped)[0][:, -1]).abs().max() > 1e-6


# ---- initial weights ----------------------------------------------------------------------------------


@every_architecture
def test_the_first_loss_is_near_the_logarithm_of_the_vocabulary(name: str) -> None:
    gpt = model(name, vocab_size=VOCAB)
    assert loss(gpt, tokens(16)).item() == pytest.approx(math.log(VOCAB), abs=0.15)
    with torch.no_grad():  # the control: the framework's N(0, 1) embedding is what systems of this kind suffer from
        gpt.embedding.weight.normal_(0, 1)
        if gpt.head is not None:
            gpt.head.weight.normal_(0, 1)
    assert loss(gpt, tokens(16)).item() > math.log(VOCAB) + 1


def test_building_is_a_function_of_the_seed() -> None:
    first, again, other = (model(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_weights_are_normal_biases_zero_and_norms_one() -> None:
    gpt = model(d_model=128, d_ff=512)
    for name, parameter in gpt.named_parameters():
        if "norm" in name:
            assert torch.all(parameter == 1), name
        elif name.endswith("bias"):
            assert torch.all(parameter == 0), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.002, name


def test_deepnorm_constants() -> None:
    assert deepnorm_alpha(40) == pytest.approx(2.9907, abs=5e-5)
    assert deepnorm_beta(40) == pytest.approx(0.2364, abs=5e-5)
    assert deepnorm_alpha(48) == pytest.approx(3.1302, abs=5e-5)
    assert deepnorm_beta(48) == pytest.approx(0.2259, abs=5e-5)


def test_deepnorm_weights_are_xavier_with_beta() -> None:
    width, hidden, layers = 96, 384, 40
    gpt = model("deep_narrow", d_model=width, n_layers=layers)
    beta = deepnorm_beta(layers)
    square, fan = math.sqrt(2 / (2 * width)), math.sqrt(2 / (width + hidden))
    block = gpt.blocks[7]
    query, key, value = block.attention.qkv.weight.chunk(3)
    gate, up = block.ffn.gate_up.weight.chunk(2)
    expected = [(query, square), (key, square), (value, beta * square), (block.attention.out.weight, beta * square)]
    expected += [(gate, beta * fan), (up, beta * fan), (block.ffn.down.weight, beta * fan)]
    for weight, std in expected:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert block.alpha == deepnorm_alpha(layers)
    assert gpt.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_deepnorm_block_is_two_scaled_postnorm_residuals() -> None:
    gpt = spread(model("deep_narrow"))
    block = gpt.blocks[0]
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    rotate = gpt.positions.first(12)

    def expected(alpha: float) -> Tensor:
        middle = block.attention_norm(alpha * x + block.attention(x, rotate))
        return block.ffn_norm(alpha * middle + block.ffn(middle))

    torch.testing.assert_close(block(x, rotate), expected(6**0.25), rtol=0, atol=1e-10)
    assert (block(x, rotate) - expected(1.0)).abs().max() > 1e-3


def test_norm_kinds_and_eps() -> None:
    deep = model("deep_narrow")
    assert isinstance(deep.blocks[0].ffn_norm, nn.LayerNorm) and deep.blocks[0].ffn_norm.eps == 1e-5
    assert isinstance(deep.final_norm, nn.RMSNorm) and deep.final_norm.eps == 1e-6
    assert isinstance(model("codelm").final_norm, nn.LayerNorm)
    assert isinstance(model("post").final_norm, nn.Identity)
    assert model(norm_eps=1e-3).final_norm.eps == 1e-3


# ---- dropout, checkpointing, switches -----------------------------------------------------------------


def test_dropout_acts_in_training_alone() -> None:
    gpt = model(dropout=0.3).train()
    assert not torch.equal(gpt(tokens())[0], gpt(tokens())[0])
    gpt.eval()
    assert torch.equal(gpt(tokens())[0], gpt(tokens())[0])


def test_position_vectors_are_dropped_only_where_asked() -> None:
    def embedded(dropped: bool) -> Tensor:
        gpt = model(dropout=0.5, dropout_positions=dropped, n_layers=1).train()
        with torch.no_grad():
            gpt.embedding.weight.zero_()
            gpt.positions.weight.fill_(1.0)
        torch.manual_seed(0)
        return gpt._embed(tokens(), gpt.positions.weight[:12])

    assert set(embedded(False).unique().tolist()) == {0.0, 2.0}
    assert set(embedded(True).unique().tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("name", ["fundamentallm", "deep_narrow"])
def test_activation_checkpointing_leaves_the_bits_alone(name: str) -> None:
    def step(checkpointing: bool, seed: int = 5) -> tuple[Tensor, list[Tensor], int]:
        gpt = model(name, dropout=0.2, activation_checkpointing=checkpointing).train()
        torch.manual_seed(seed)
        kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            value = loss(gpt, tokens())
        value.backward()
        return value, [parameter.grad for parameter in gpt.parameters()], kept

    plain, recomputed, other = step(False), step(True), step(True, seed=6)
    assert torch.equal(plain[0], recomputed[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], recomputed[1], strict=True))
    assert recomputed[2] < plain[2] / 2  # it does save memory
    assert not all(torch.equal(a, b) for a, b in zip(plain[1], other[1], strict=True))


def test_switches_reach_every_part() -> None:
    gpt = model(dropout=0.0)
    apply_switches(gpt, config(dropout=0.4, activation_checkpointing=True))
    torch.manual_seed(3)
    switched = loss(gpt.train(), tokens())
    built = model(dropout=0.4, activation_checkpointing=True).train()
    torch.manual_seed(3)
    assert torch.equal(switched, loss(built, tokens()))
    apply_switches(gpt, config(dropout=0.0))
    assert torch.equal(loss(gpt, tokens()), loss(model().eval(), tokens()))


def test_switches_know_other_modules_and_refuse_what_they_cannot_do() -> None:
    other = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    apply_switches(other, config(dropout=0.1))
    assert other[1].p == 0.1
    with pytest.raises(ConfigError, match="no such switch"):
        apply_switches(other, config(activation_checkpointing=True))


@pytest.mark.parametrize("name", ["fundamentallm", "deep_narrow"])
def test_the_graph_compiles_whole(name: str) -> None:
    gpt = spread(model(name))
    compiled = torch.compile(gpt, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens())[0], gpt(tokens())[0], rtol=0, atol=1e-10)


@every_architecture
def test_a_few_steps_learn(name: str) -> None:
    gpt = model(name).train()
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        value = loss(gpt, tokens(4))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.5
