import math

import pytest
import torch

from ddim.attention import DotProductAttention
from ddim.layers import ResnetBlock, timestep_embedding
from ddim.network import DDPMUNet
from ddim.pretrained import REPOSITORY, build_network, load_config


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def small(**changes):
    config = {"in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
    return DDPMUNet(**{**config, "attn_resolutions": [4], "image_size": 8, **changes}).eval().requires_grad_(False)


def test_golden_prediction_in_float64(network, case_io):
    out = network.double()(case_io["x"].double(), case_io["t"])
    assert out.dtype == torch.float64
    assert relative(out, case_io["eps_fp"]) < 1e-9


# The golden network has one channel per norm group, so its norms remove the time embedding: these two see it.


def test_time_embedding_passes_two_dense_layers_with_silu_between(network, case_io):
    network.double()
    state = network.start(case_io["x"], case_io["t"])
    for segment in network.chain()[:2]:
        state = segment(state)
    first, second = network.temb.dense
    features = first(timestep_embedding(case_io["t"], 32, torch.float64))
    assert relative(state.temb, second(features * features.sigmoid())) < 1e-14


@pytest.mark.parametrize("skip_channels", [0, 64])
def test_resnet_block_adds_the_time_embedding_between_its_convolutions(generator, skip_channels):
    block = ResnetBlock(64, 96, 40, dropout=0.5, conv_shortcut=False, skip_channels=skip_channels).double().eval()
    x = torch.randn(2, 64 + skip_channels, 6, 6, dtype=torch.float64, generator=generator)
    temb = torch.randn(2, 40, dtype=torch.float64, generator=generator)

    def normalised(h):
        groups = h.unflatten(1, (32, -1))
        centred = groups - groups.mean((2, 3, 4), keepdim=True)
        return (centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-6).sqrt()).flatten(1, 2)

    def swish(h):
        return h * h.sigmoid()

    h = block.conv1(swish(normalised(x))) + block.temb_proj(swish(temb))[:, :, None, None]
    expected = block.nin_shortcut(x) + block.conv2(swish(normalised(h)))
    assert relative(block(x, temb), expected) < 1e-13


def test_golden_prediction_in_float32_is_exact_to_rounding(network, case_io):
    assert relative(network(case_io["x"], case_io["t"].long()), case_io["eps_fp"]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_output_follows_the_dtype_of_the_parameters(network, case_io, dtype):
    assert network.to(dtype)(case_io["x"], case_io["t"]).dtype == dtype


def test_forward_is_the_chain_run_by_hand(network, case_io):
    state = network.start(case_io["x"], case_io["t"])
    for segment in network.chain():
        state = segment.write(state, segment.module(*segment.read(state)))
    assert state.skips == ()
    assert torch.equal(state.h, network(case_io["x"], case_io["t"]))


def test_chain_names_the_modules_in_the_order_in_which_they_run(network, case_io):
    names = [segment.name for segment in network.chain()]
    assert all(network.get_submodule(segment.name) is segment.module for segment in network.chain())
    ran = []
    for name, module in network.named_modules():
        if name in names:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    network(case_io["x"], case_io["t"])
    assert ran == names
    assert names[:3] == ["temb.dense.0", "temb.dense.1", "conv_in"] and names[-1] == "conv_out"
    assert names.index("up.1.upsample") < names.index("up.0.block.0")


def test_chain_covers_every_parameter_but_the_output_norm(network):
    covered = {id(p) for segment in network.chain() for p in segment.module.parameters()}
    assert {n for n, p in network.named_parameters() if id(p) not in covered} == {"norm_out.weight", "norm_out.bias"}


def test_a_replaced_module_is_used(network, case_io):
    before = network(case_io["x"], case_io["t"])
    network.up[0].block[1].conv2 = torch.nn.Conv2d(32, 32, 3, padding=1)
    network.conv_out = torch.nn.Sequential(network.conv_out, torch.nn.Conv2d(3, 3, 1))
    after = network(case_io["x"], case_io["t"])
    assert relative(after, before) > 0.1


def test_shortcut_boundary_is_where_the_skip_begins(network, case_io):
    state = network.start(case_io["x"], case_io["t"])
    joined = 0
    for segment in network.chain():
        boundary = getattr(segment.module, "shortcut_boundary", None)
        assert (boundary is not None) == (segment.name.startswith("up.") and ".block." in segment.name)
        if boundary is not None:
            x, _ = segment.read(state)
            assert torch.equal(x[:, :boundary], state.h) and torch.equal(x[:, boundary:], state.skips[-1])
            joined += 1
        state = segment(state)
    assert joined == 4


def test_config_rebuilds_the_network(network, case_io):
    again = DDPMUNet(**network.config).eval()
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(case_io["x"], case_io["t"]), network(case_io["x"], case_io["t"]))


def test_images_of_a_batch_do_not_influence_each_other(network, case_io):
    network.double()
    x, t = case_io["x"].double(), case_io["t"]
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(len(x))])
    assert relative(alone, network(x, t)) < 1e-12


def test_published_configuration_has_the_published_size_and_names():
    with torch.device("meta"):
        network = build_network(load_config(REPOSITORY / "configs" / "cifar10.yml"))
    assert sum(p.numel() for p in network.parameters()) == 35_746_307
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes["temb.dense.0.weight"] == (512, 128)
    assert shapes["down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["down.1.attn.1.proj_out.weight"] == (256, 256, 1, 1)
    assert shapes["down.2.downsample.conv.weight"] == (256, 256, 3, 3)
    assert shapes["mid.attn_1.q.bias"] == (256,)
    assert shapes["up.0.block.0.nin_shortcut.weight"] == (128, 384, 1, 1)
    assert shapes["up.3.upsample.conv.weight"] == (256, 256, 3, 3)
    assert shapes["norm_out.weight"] == (128,)
    assert not any(name.startswith(("up.0.upsample", "down.3.downsample", "up.0.attn")) for name in shapes)


def test_shortcuts_are_3x3_where_asked():
    shapes = {name: p.shape for name, p in small(conv_shortcut=True).named_parameters()}
    assert shapes["down.1.block.0.conv_shortcut.weight"] == (64, 32, 3, 3)
    assert not any("nin_shortcut" in name for name in shapes)


def test_resampling_without_convolutions_has_no_weights(generator):
    network = small(resamp_with_conv=False)
    assert not any("sample" in name for name, _ in network.named_parameters())
    x = torch.randn(2, 32, 8, 8, generator=generator)
    down, up = network.down[0].downsample, network.up[1].upsample
    assert torch.allclose(down(x)[:, :, 1, 2], x[:, :, 2:4, 4:6].mean((2, 3)), atol=1e-6)
    assert torch.equal(down(up(x)), x)
    assert network(torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([1, 2])).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("operand_scale, score_scale", [(1.0, 32**-0.5), (32**-0.25, 1.0)])
def test_attention_is_softmax_of_scaled_products(generator, operand_scale, score_scale):
    q, k, v = (torch.randn(2, 1, n, 32, dtype=torch.float64, generator=generator) for n in (5, 7, 7))
    scores = (q * operand_scale) @ (k * operand_scale).transpose(-1, -2) * score_scale
    expected = scores.softmax(-1) @ v
    assert relative(DotProductAttention(operand_scale, score_scale)(q, k, v), expected) < 1e-14


def test_timestep_embedding_has_sines_first_and_the_longest_period_last():
    out = timestep_embedding(torch.tensor([0, 7]), 8, torch.float64)
    angles = [7 * 10000 ** (-i / 3) for i in range(4)]
    expected = [[0.0] * 4 + [1.0] * 4, [math.sin(a) for a in angles] + [math.cos(a) for a in angles]]
    assert torch.allclose(out, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("changes, match", [({"ch": 48}, "ch .*48"), ({"image_size": 9}, "image_size .*9")])
def test_sizes_that_do_not_fit_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        small(**changes)


def test_inputs_of_another_shape_are_refused(network):
    with pytest.raises(ValueError, match=r"\[3, 16, 16\], found \[2, 3, 8, 8\]"):
        network(torch.zeros(2, 3, 8, 8), torch.zeros(2))
    with pytest.raises(ValueError, match="one timestep per image"):
        network(torch.zeros(2, 3, 16, 16), torch.zeros(1))
