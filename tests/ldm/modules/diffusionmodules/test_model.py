import pytest
import torch

from ldm.modules.diffusionmodules.model import Decoder, Encoder

SMALL = {"ch": 32, "out_ch": 3, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0}
SMALL |= {"in_channels": 3, "resolution": 16, "z_channels": 4}


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def levels_with_attention(path):
    return [i for i, level in enumerate(path) if len(level.attn)]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_encoder_shrinks_by_two_per_level_below_the_first_and_the_decoder_grows_back(generator):
    encoder, decoder = Encoder(**SMALL), Decoder(**SMALL)
    moments = encoder(torch.randn(2, 3, 16, 24, generator=generator))
    assert moments.shape == (2, 8, 4, 6)
    assert decoder(moments[:, :4]).shape == (2, 3, 16, 24)
    assert Encoder(**{**SMALL, "double_z": False})(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 4, 4)


def test_published_names():
    encoder, decoder = shapes(Encoder(**SMALL)), shapes(Decoder(**SMALL))
    assert encoder["conv_in.weight"] == (32, 3, 3, 3) and decoder["conv_in.weight"] == (64, 4, 3, 3)
    assert encoder["down.0.downsample.conv.weight"] == (32, 32, 3, 3)
    assert encoder["down.1.block.0.nin_shortcut.weight"] == (64, 32, 1, 1)
    assert encoder["down.1.attn.0.proj_out.weight"] == (64, 64, 1, 1)
    assert encoder["mid.block_1.conv1.weight"] == decoder["mid.block_2.conv2.weight"] == (64, 64, 3, 3)
    assert encoder["mid.attn_1.norm.weight"] == decoder["mid.attn_1.q.bias"] == (64,)
    assert encoder["norm_out.weight"] == (64,) and decoder["norm_out.weight"] == (32,)
    assert encoder["conv_out.weight"] == (8, 64, 3, 3) and decoder["conv_out.weight"] == (3, 32, 3, 3)
    assert decoder["up.0.block.0.nin_shortcut.weight"] == (32, 64, 1, 1)
    assert decoder["up.1.attn.1.k.weight"] == (64, 64, 1, 1)
    assert decoder["up.2.upsample.conv.weight"] == (64, 64, 3, 3)
    absent = ("down.2.downsample", "up.0.upsample", "down.0.block.1", "up.0.block.2")
    assert not any(name.startswith(absent) or "temb" in name for name in {**encoder, **decoder})


def test_attention_is_at_the_resolutions_asked_for_and_in_the_middle():
    encoder, decoder = Encoder(**SMALL), Decoder(**SMALL)
    assert levels_with_attention(encoder.down) == levels_with_attention(decoder.up) == [1]
    for half in (Encoder(**SMALL, attn_type="none"), Decoder(**SMALL, attn_type="none")):
        assert not any("attn" in name for name in half.state_dict())


def test_attention_changes_the_result(generator):
    encoder, x = Encoder(**SMALL), torch.randn(1, 3, 16, 16, generator=generator)
    before = encoder(x)
    torch.nn.init.zeros_(encoder.down[1].attn[0].proj_out.weight)
    without_level = encoder(x)
    torch.nn.init.zeros_(encoder.mid.attn_1.proj_out.weight)
    assert not torch.allclose(before, without_level) and not torch.allclose(without_level, encoder(x))


def test_ends_of_the_decoder(generator):
    z = 100 * torch.randn(1, 4, 4, 4, generator=generator)
    decoder = Decoder(**SMALL)
    torch.nn.init.constant_(decoder.conv_out.bias, 0.5)
    image = decoder(z)
    decoder.tanh_out = True
    assert torch.equal(decoder(z), image.tanh())
    decoder.give_pre_end = True
    features = decoder(z)
    assert features.shape == (1, 32, 16, 16)
    assert torch.equal(decoder.conv_out(decoder.norm_out(features)), image)


def test_resampling_without_convolutions_has_no_weights():
    encoder, decoder = Encoder(**SMALL, resamp_with_conv=False), Decoder(**SMALL, resamp_with_conv=False)
    assert not any("sample" in name for name in {**encoder.state_dict(), **decoder.state_dict()})
    assert decoder(encoder(torch.zeros(1, 3, 16, 16))[:, :4]).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"ch": 48}, "multiples of 32 .*48"),
        ({"ch_mult": []}, "ch_mult .*none"),
        ({"attn_type": "linear"}, "attn_type: .*found linear"),
        ({"use_linear_attn": True}, "attn_type: .*found linear"),
    ],
)
@pytest.mark.parametrize("half", [Encoder, Decoder])
def test_unfit_arguments_are_refused(half, changes, match):
    with pytest.raises(ValueError, match=match):
        half(**{**SMALL, **changes})


def test_other_entries_of_a_published_ddconfig_are_ignored():
    assert shapes(Encoder(**SMALL, mask_channels=1)) == shapes(Encoder(**SMALL))
