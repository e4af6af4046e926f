"""From the options of the `activations` section to one rule per layer.

recompute   layer input and attention output stay in device memory, everything else is rebuilt: MEMO's alpha = 0.
memo        MEMO's rule (arXiv 2407.12117, section 4): layer input and attention output of every layer are swapped, one
            fraction alpha of the tokens of all other saved tensors too, the rest is rebuilt; the last layers are left
            alone, since their backward pass starts before a copy could come back.
ordered     densest first: what costs most to rebuild, by byte, is stored first. Attention output (O(s) a byte), then
            the outputs of the linear layers (O(h) a byte, all alike: one fraction for them). What element-wise
            operations make is never stored: rebuilding it is 26 times faster than a PCIe link.

Compressed are, with `compress: fp8`, the tensors in which an error stays where it is: what a weight gradient sums over
all tokens, and what the activation function of the MLP is given. Not by default: layer input and attention output, from
which others are rebuilt. Never: query and key. The backward pass of attention makes its probabilities anew, as
exp(q k - log-sum-exp), and with another q or k than the forward pass had they do not sum to 1.

Modules that save their input in 8 bits already (`fp8.saved_activations`): it is swapped as it is. Under `ordered` it
takes the place of the output of fc1, of which it is made, at half the bytes.
"""

from __future__ import annotations

from dataclasses import replace

from megamem.config import Activations, LowPrecision
from megamem.errors import ConfigError
from megamem.ir.activation import ANCHORS, BASE, KEEP, RECOMPUTE, SAVED, SWAP, ActivationPlan, Codec, Fate, LayerRule

_ATTENTION = "self_attention.core_attention"
_SAFE = ("self_attention.linear_qkv", "mlp")  # modules, in whose saved tensors an error stays where it is
CODED = "mlp"
"""The module that saves the input of its activation function in 8 bits, with `fp8.saved_activations: mlp` and `all`."""
_CODED = {"mlp": (CODED,), "all": (CODED, "input_layernorm", "pre_mlp_layernorm")}  # modules that save 8 bits
_EXPERTS = {"keep": KEEP, "swap": SWAP, "recompute": KEEP}  # recomputed by Megatron's own checkpoint of the MoE layer


def plan_activations(
    options: Activations, num_layers: int, low_precision: LowPrecision | None = None
) -> ActivationPlan:
    """One rule for each of the model's `num_layers` layers; `low_precision` says what modules save in 8 bits.

    Raises ConfigError with everything in the table that cannot be done for this model.
    """
    coded = coded_modules(low_precision)
    fates = _policy(options)
    if coded and options.policy == "ordered":
        fates |= {CODED: fates["fc1"], "fc1": RECOMPUTE}
    kept = options.keep_last_layers if options.policy in ("memo", "ordered") else 0
    rows: list[dict[str, Fate]] = [{} for _ in range(num_layers)]
    for row in options.table:
        for number in row.layer_numbers(num_layers):
            rows[number - 1].update(row.fates)
    problems = [problem for number, row in enumerate(rows, start=1) for problem in _problems(row, number)]
    if problems:
        raise ConfigError(problems)
    return ActivationPlan(
        rules=tuple(
            LayerRule(
                untouched=number > num_layers - kept and not row,
                fates=_with_codecs({**fates, **row}, options.compress, coded),
                store_input=(number - 1) % options.residual_every == 0,
            )
            for number, row in enumerate(rows, start=1)
        ),
        experts_again=options.experts == "recompute",
    )


def coded_modules(low_precision: LowPrecision | None) -> tuple[str, ...]:
    """The modules that save 8 bits themselves."""
    return () if low_precision is None else _CODED.get(low_precision.saved_activations, ())


def is_compressed(name: str, coded: tuple[str, ...] = ()) -> bool:
    """Whether `activations.compress` is for a tensor: of a module's path, or an anchor; `coded` modules save codes."""
    if any((name + ".").startswith(path + ".") for path in coded):
        return False
    return (name == "fc1" and not coded) or any((name + ".").startswith(path + ".") for path in _SAFE)


def _with_codecs(fates: dict[str, Fate], compress: Codec, coded: tuple[str, ...]) -> dict[str, Fate]:
    """The fates with a codec wherever compression gives one and they do not say it themselves; codes have none."""
    fates = dict(fates)
    if compress != "none":
        for path in _SAFE:
            fates.setdefault(path, fates[SAVED])
        for name, fate in fates.items():
            if is_compressed(name) and fate.codec is None and fate.tier == "host" and fate.fraction > 0:
                fates[name] = replace(fate, codec=compress)
    if fates[SAVED].codec == "fp8":
        fates.setdefault(_ATTENTION, replace(fates[SAVED], codec=None))
    return fates | {path: replace(fates.get(path, fates[SAVED]), codec=None) for path in coded}


def _policy(options: Activations) -> dict[str, Fate]:
    """The fates of every layer, before the table."""
    if options.policy == "auto" or isinstance(options.swap_fraction, str):
        raise ConfigError("activations: policy and swap_fraction are left to the planner; megamem.enable asks it")
    share = Fate(fraction=options.swap_fraction)
    base, anchors, saved = {
        "recompute": (KEEP, RECOMPUTE, RECOMPUTE),
        "memo": (SWAP, RECOMPUTE, share),
        "ordered": (SWAP, share, RECOMPUTE),
    }[options.policy]
    return {
        **dict.fromkeys(BASE, base),
        **dict.fromkeys(ANCHORS, anchors),
        SAVED: saved,
        "experts": _EXPERTS[options.experts],
    }


def _problems(row: dict[str, Fate], number: int) -> list[str]:
    """What a row asks for that would mean running attention again, or the layer before."""
    problems = [
        f"activations.table: layer {number}: {name}: {row[name]} would need {need}; give keep or swap"
        for name, need in (
            ("attention_output", "attention to run again"),
            ("layer_input", "the layer before to run again (residual_every does that)"),
        )
        if name in row and row[name].fraction < 1
    ]
    problems += [
        f"activations.table: layer {number}: {name}: {fate} would change query or key after attention has used them; "
        f"leave {fate.codec} out"
        for name, fate in row.items()
        if fate.codec == "fp8" and (name == "qkv" or (name + ".").startswith(_ATTENTION + "."))
    ]
    if "experts" in row and row["experts"].codec == "fp8":
        problems.append(
            f"activations.table: layer {number}: experts: {row['experts']}: what experts save is swapped as it is, "
            "routing and all; leave fp8 out"
        )
    if "experts" in row and row["experts"].fraction < 1:
        problems.append(
            f"activations.table: layer {number}: experts: {row['experts']} is possible for all layers only; set "
            "activations.experts: recompute"
        )
    return problems
