"""Kernels compile for the chips they are made for, which needs no such chip, and multiply bytes on tensor cores."""

import pytest

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from qdiff.deploy.kernels import attention, norms, product

SHARED_MEMORY = 232448  # bytes that a program can have on an H100
POINTERS = {"scale_at": "*fp32", "w_scale_at": "*fp32", "bias_at": "*fp32", "sets_at": "*i64", "statistics_at": "*fp32"}
INTEGER_TILE = {"TAPS": 9, "KW": 3, "SH": 1, "SW": 1, "PH": 1, "PW": 1, "DH": 1, "DW": 1, "RAW": False, "GROUP": 8}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def build(kernel, constants, pointers, config, floats=()):
    """Compile for compute capability 9.0. Tensors are aligned and sizes divide by 16; what is no constant, pointer or
    float is an int32."""
    types = {name: "i32" for name in kernel.arg_names if name not in constants}
    types |= dict.fromkeys(floats, "fp32")
    types |= {name: kind for name, kind in (POINTERS | pointers).items() if name in types}
    types |= {name: "*i32" for name in types if name.endswith("_at") and types[name] == "i32"}
    positions = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={positions[name]: value for name, value in constants.items()},
        attrs={positions[name]: [["tt.divisibility", 16]] for name in types if name not in floats},
    )
    return compile(source, target=GPUTarget("cuda", 90, 32), options=config.options)


def flags(names, true=()):
    return {name: name in true for name in names}


@pytest.mark.parametrize("weights", ["bytes", "nibbles", "weight-only"])
@pytest.mark.cases("nibbles", "weight-only")
def test_products(weights):
    nibbles, float_ = weights == "nibbles", weights == "weight-only"
    config = (product.FLOAT_CONFIGS if float_ else product.INTEGER_CONFIGS)[0]
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    switches = {"HAS_SETS", "HAS_ZERO", "HAS_WINDOWS", "HAS_BIAS", "HAS_OTHER", "EVEN"}
    constants = {**INTEGER_TILE, **tile, "NIBBLES": nibbles, "FLOAT": float_, "other_channel": 1}
    constants |= flags(switches, switches - ({"HAS_WINDOWS"} if float_ else set()))
    pointers = {"a_at": "*fp16" if float_ else "*i8", "w_at": "*u8" if nibbles else "*i8", "out_at": "*fp16"}
    built = build(product._product, constants, pointers | {"other_at": "*fp16"}, config)
    kind = "f32.f16.f16" if float_ else "s32.s8.s8"
    assert "wgmma.mma_async" in built.asm["ptx"] and kind in built.asm["ptx"] and "cp.async.cg" in built.asm["ptx"]
    assert built.metadata.shared <= SHARED_MEMORY


def test_attention():
    config = attention.CONFIGS[0]
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_E": config.block_k, "BLOCK_D": 64}
    switches = ("HAS_SETS", "HAS_Q_ZERO", "HAS_K_ZERO", "HAS_V_ZERO")
    pointers = {f"{operand}_at": "*i8" for operand in "qkv"} | {f"{operand}_scale_at": "*fp32" for operand in "qkvw"}
    constants = {**tile, **flags(switches, switches), "WIDE": True}
    floats = ("score_factor", "w_lo", "w_hi")
    built = build(attention._attention, constants, pointers | {"out_at": "*fp16"}, config, floats)
    assert "wgmma.mma_async" in built.asm["ptx"] and built.metadata.shared <= SHARED_MEMORY


def test_merging_of_statistics_of_one_pixel():
    """Sizes of 1 become constants when a kernel is compiled, which takes other paths than tensors do."""
    constants = {"BLOCK_P": 64, "BLOCK_G": 8, "BLOCK_B": 4, "BLOCK_D": 8, "pixels": 1, "width": 1, "blocks": 1}
    pointers = {"mean_at": "*fp32", "spread_at": "*fp32"}
    assert build(norms._merge, constants, pointers, attention.CONFIGS[0], ("eps",)).asm["ptx"]


def test_group_norm():
    constants = {"SILU": True, "HAS_SETS": True, "BLOCK_P": 64, "BLOCK_C": 64}
    pointers = {"x_at": "*fp16", "out_at": "*i8", "weight_at": "*fp16", "bias_at": "*fp16"}
    assert build(norms._group_norm, constants, pointers, attention.CONFIGS[0], ("qmin", "qmax")).asm["ptx"]
