"""Swap in FP8: fewer bytes in host memory and over the link, gradients within the error of the codec, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install 'megamem[train]'")

from megamem.kernels.block_codec import BlockFormat, dequantise, quantise  # noqa: E402
from megamem.runtime.activations.codec import Fp8Codec, codec_for  # noqa: E402
from megamem.runtime.activations.host_arena import HostArena  # noqa: E402
from megamem.runtime.activations.parcels import Courier, Manifest  # noqa: E402
from megamem.testing.streams import SimulatedDevice  # noqa: E402

Fields = dict[str, Any]
Dist = Callable[[int], Callable[..., list[Any]]]
SWAP: Fields = {"policy": "memo", "keep_last_layers": 0}
LLAMA: Fields = {"layers": 3, "kv_groups": 2, "activation": "swiglu", "norm": "RMSNorm", "bias": False}
GPT: Fields = {"layers": 3, "position": "learned_absolute", "activation": "gelu", "norm": "LayerNorm"}
SPARED = dict.fromkeys(("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"), "swap/none")


def through_fp8(tensor: Any) -> Any:
    return dequantise(quantise(tensor, BlockFormat()), BlockFormat(), tensor.dtype)


@pytest.mark.parametrize("policy", ["latest", "earliest", "random"])
@pytest.mark.parametrize("forward", [False, True])
def test_a_parcel_brings_back_what_the_codec_makes_of_a_tensor(policy: Any, forward: bool) -> None:
    device = SimulatedDevice(0, policy)
    courier = Courier(device, HostArena(device, 1 << 16))
    coded = [torch.randn(5, 300), torch.randn(4, 2, 160).bfloat16()[1:3], torch.randn(256, requires_grad=True)]
    tensors = [coded[0], torch.randn(7), *coded[1:]]
    codecs = [Fp8Codec(), None, Fp8Codec(), Fp8Codec()]
    want = [tensor.detach() if codec is None else through_fp8(tensor.detach())
            for tensor, codec in zip(tensors, codecs, strict=True)]  # fmt: skip
    manifest = Manifest(tensors, codecs)
    assert manifest.exposed == [1]
    assert manifest.tensors_nbytes == sum(tensor.nbytes for tensor in tensors)
    assert manifest.nbytes == 5 * 300 + 5 * 3 * 4 + 7 * 4 + 640 + 4 * 2 * 4 + 256 + 2 * 4
    parcel = courier.store(tensors, manifest=manifest)
    assert parcel is not None and (parcel.nbytes, parcel.tensors_nbytes) == (manifest.nbytes, manifest.tensors_nbytes)
    assert courier.ledger.staging_nbytes == manifest.nbytes  # the tensors themselves are nobody's concern any more
    with torch.no_grad():
        for tensor in coded:
            tensor.fill_(float("nan"))
    if not forward:
        courier.retire(0)
    for got, expected in zip(courier.take(parcel), want, strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected) and not got.requires_grad
    courier.flush()
    device.synchronize()
    device.check_quiescent()
    assert (courier.ledger.staging_nbytes, courier.arena.in_use) == (0, 0)


def test_room_is_asked_for_before_anything_is_encoded() -> None:
    device = SimulatedDevice(0)
    courier = Courier(device, HostArena(device, 1024))
    tensors = [torch.randn(4, 2048)]
    assert courier.store(tensors, manifest=Manifest(tensors, [Fp8Codec()])) is None
    assert courier.arena.in_use == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_only_what_the_codec_knows_is_encoded(dtype: Any) -> None:
    assert codec_for("fp8", dtype) is None
    assert codec_for("none", torch.bfloat16) is codec_for(None, torch.bfloat16) is None


def test_an_infinity_is_not_hidden() -> None:
    tensor = torch.ones(2, 256)
    tensor[0, 3] = float("inf")
    codec = Fp8Codec()
    got = codec.decode(codec.encode(tensor), tensor.dtype)
    assert bool(got[0, :128].isnan().all()) and bool(got[0, 128:].isfinite().all()) and bool(got[1].isfinite().all())


def compare(fields: Fields, configs: dict[str, Fields]) -> dict[str, Any]:
    """Per configuration: relative error of the worst gradient, what was swapped, and in how many bytes."""
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.parity import relative_error, train

    case = GptCase(**{**fields, "dtype": getattr(torch, fields.get("dtype", "float32"))})
    init_parallel(case)
    stock = train(case)
    found = {}
    for name, config in configs.items():
        ours = train(case, config)
        assert ours.engine is not None
        errors = {key: relative_error(ours.gradients[key], old) for key, old in stock.gradients.items()}
        found[name] = {
            "differences": ours.differences(stock),
            "worst": max(errors.values()),
            "tensors": ours.engine.stats.swapped_nbytes,
            "link": ours.engine.stats.link_nbytes,
            "ledger": ours.engine.courier.ledger.bytes_stored,
            "host": ours.engine.courier.arena.peak,
            "losses": [abs(one - other) for one, other in zip(ours.losses, stock.losses, strict=True)],
        }
    return found


@pytest.mark.megatron
@pytest.mark.parametrize("fields", [GPT, LLAMA, {**LLAMA, "dtype": "bfloat16"}], ids=["gpt", "llama", "bf16"])
def test_compressed_swap_trains_within_the_error_of_the_codec(dist: Dist, fields: Fields) -> None:
    table = [{"layers": "all", **SPARED}]
    configs = {
        "swap": SWAP,
        "fp8": {**SWAP, "compress": "fp8"},
        "half": {**SWAP, "compress": "fp8", "swap_fraction": 0.5},
        "ordered": {"policy": "ordered", "compress": "fp8", "swap_fraction": 0.5, "keep_last_layers": 0},
        "spared": {**SWAP, "table": [{"layers": "all", **SPARED, "fc1": "recompute"}]},
        "more": {**SWAP, "compress": "fp8", "table": [{"layers": "all", "attention_output": "swap/fp8"}]},
        "only the gate": {**SWAP, "compress": "fp8", "table": table},
    }
    (found,) = dist(1)(compare, fields, configs, timeout=240)
    assert found["swap"]["differences"] == found["spared"]["differences"] == []
    for name, outcome in found.items():
        assert outcome["losses"][0] <= (1e-5 if "dtype" not in fields else 1e-2), name  # before the first update
        if name not in ("swap", "spared"):
            assert 0 < outcome["worst"] < 0.1, (name, outcome)
        assert outcome["link"] == outcome["ledger"]
        assert (outcome["link"] < outcome["tensors"]) == (name not in ("swap", "spared")), name
    assert found["fp8"]["tensors"] == found["swap"]["tensors"]
    assert found["fp8"]["host"] < found["swap"]["host"]
    assert found["more"]["link"] < found["fp8"]["link"] < found["only the gate"]["link"] < found["swap"]["link"]


@pytest.mark.megatron
def test_compressed_swap_under_tensor_and_pipeline_parallelism(dist: Dist) -> None:
    fields = {**LLAMA, "layers": 4, "tp": 2, "sp": True, "pp": 2}
    configs = {"fp8": {**SWAP, "compress": "fp8"}, "half": {**SWAP, "compress": "fp8", "swap_fraction": 0.5}}
    for found in dist(4)(compare, fields, configs, timeout=240):
        for name, outcome in found.items():
            assert 0 < outcome["worst"] < 0.1, (name, outcome)
            assert outcome["link"] < 0.8 * outcome["tensors"]


@pytest.mark.megatron
def test_what_experts_are_given_is_not_compressed(dist: Dist) -> None:
    """The router decides by it, and a checkpoint of the experts would decide again."""
    fields = {**LLAMA, "layers": 2, "experts": 4}
    table = [{"layers": "all", "self_attention.linear_qkv": "swap/none"}]
    configs = {name: {**SWAP, "compress": "fp8", "experts": name, "table": table} for name in ("swap", "recompute")}
    (found,) = dist(1)(compare, fields, configs, timeout=240)
    assert found["swap"]["differences"] == found["recompute"]["differences"] == []
