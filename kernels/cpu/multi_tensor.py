"""The two generic kernels, one element after the other. Twin of kernels/multi_tensor.py, which tells the arguments."""

import numpy as np

from ..arithmetic import lerp
from . import quantized
from .gate import decide
from .memory import arguments, check_count, load, nearest, scratch, static_range, store, where
from .rounding import TILE, random_bits, stochastic, with_compensation, with_master

HALVES = ("bfloat16", "float16")
NARROW = (*HALVES, *quantized.CODES)
RANDOM = 2 * (TILE + 8)  # bytes of scratch for the random bits of a stream
VALUES = 4 * quantized.BLOCK  # and for the new values of a state in 8 bits


def load_number(address, absent):
    """The fp32 at an odd address less one, the fp64 at an even one, `absent` at 0; in float64."""
    if address == 0:
        return absent
    if address % 2 == 1:
        return np.float64(load(address - 1, 0, "float32"))
    return load(address, 0, "float64")


def store_number(address, value):
    """Where `load_number` read; nowhere at 0."""
    if address % 2 == 1:
        store(address - 1, 0, value, "float32")
    elif address != 0:
        store(address, 0, value, "float64")


def prepare(args, program, SCALARS, N_HYPER, N_SCALAR_STATES, N_SCALARS, HYPER_TENSORS, COMPUTE, BLOCK_SIZE):
    """Advance the per-tensor states and compute each tensor's scalars, in float64."""
    (
        groups_ptr, grads_ptr, scalar_states_ptr, hyper_ptr, hyper_tensors_ptr, limits_ptr, limit_tensors_ptr,
        scalars_ptr, control_ptr, n_tensors,
        grad_scale_ptr, found_inf_ptr, partials_ptr, grad_norm_ptr, skipped_steps_ptr, rounding_step_ptr, n_partials,
        rounding_advance,
    ) = arguments(args, 18)  # fmt: skip
    limits = ()
    for i in static_range(3):
        limit = load(limits_ptr, i, "float64")
        limits += (load_number(load(limit_tensors_ptr, i, "int64"), limit) if HYPER_TENSORS else limit,)
    unscale, factor, skip, grad_norm = decide(limits, grad_scale_ptr, found_inf_ptr, partials_ptr, n_partials)
    if program == 0:
        store(control_ptr, 0, factor, "float64")
        store(control_ptr, 1, np.float64(skip), "float64")
        store(control_ptr, 2, unscale, "float64")
        store(grad_norm_ptr, 0, grad_norm, "float64")
        store(skipped_steps_ptr, 0, load(skipped_steps_ptr, 0, "int64") + skip, "int64")
        rounding_step = load(rounding_step_ptr, 0, "int64") + where(skip, 0, rounding_advance)
        store(rounding_step_ptr, 0, rounding_step, "int64")
        store(control_ptr, 3, np.float64(rounding_step), "float64")
    if skip:
        return

    for tensor in range(program * BLOCK_SIZE, min(n_tensors, (program + 1) * BLOCK_SIZE)):
        if load(grads_ptr, tensor, "int64") == 0:
            continue
        first = load(groups_ptr, tensor, "int64") * (N_HYPER + 1)

        hyper = ()
        for i in static_range(N_HYPER + 1):
            value = load(hyper_ptr, first + i, "float64")
            if HYPER_TENSORS:
                value = load_number(load(hyper_tensors_ptr, first + i, "int64"), value)
            if i < N_HYPER:
                hyper += (value,)
            else:
                ema_decay = value

        addresses = ()
        scalar_states = ()
        first = tensor * (N_SCALAR_STATES + 1)
        for i in static_range(N_SCALAR_STATES):
            address = load(scalar_states_ptr, first + i, "int64")
            addresses += (address,)
            scalar_states += (load_number(address, 1.0),)
        ema_begun_address = load(scalar_states_ptr, first + N_SCALAR_STATES, "int64")
        ema_begun = load_number(ema_begun_address, 1.0)
        ema_weight = where(ema_begun == 0, 1.0, 1 - ema_decay)

        scalars, scalar_states = SCALARS(hyper, scalar_states)
        check_count(scalars, N_SCALARS, "scalars")
        check_count(scalar_states, N_SCALAR_STATES, "scalar states")

        for i in static_range(N_SCALAR_STATES):
            store_number(addresses[i], scalar_states[i])
        store_number(ema_begun_address, 1.0)
        first = tensor * (N_SCALARS + 1)
        for i in static_range(N_SCALARS):
            store(scalars_ptr, first + i, scalars[i], "float64")
        store(scalars_ptr, first + N_SCALARS, ema_weight, "float64")


def update_element(
    param_address, grad_address, state_addresses, scales, kept_address, ema_address, scalars, grad_factor, unscale,
    ema_weight, bits, values, lane, offset, UPDATE, PARAM, GRAD, UNSCALE, STATES, KEPT, EMA, STOCHASTIC, COMPUTE,
):  # fmt: skip
    """One element of every stream: load, apply the rule, store; states in 8 bits at `values`, to be encoded."""
    param = COMPUTE(load(param_address, offset, PARAM))
    scaled_grad = load(grad_address, offset, GRAD) if GRAD == "float64" else COMPUTE(load(grad_address, offset, GRAD))
    grad = grad_factor * COMPUTE(scaled_grad)
    states = ()
    for i in static_range(len(STATES)):
        if STATES[i] is None:
            states += (param,)
        elif STATES[i] in quantized.CODES:
            states += (COMPUTE(quantized.decode(state_addresses[i], offset, scales[i], STATES[i])),)
        else:
            states += (COMPUTE(load(state_addresses[i], offset, STATES[i])),)
    if KEPT == "master_param":
        param = with_master(param, load(kept_address, offset, "float32"), PARAM)
    elif KEPT == "kahan_comp":
        param = with_compensation(param, load(kept_address, offset, PARAM), PARAM)
    if UNSCALE:
        store(grad_address, offset, unscale * scaled_grad, GRAD)

    param, states = UPDATE(param, grad, states, scalars, STATES)
    check_count(states, len(STATES), "states")

    if STOCHASTIC and PARAM in HALVES and KEPT is None:
        param = stochastic(param, load(bits, lane, "uint16"), PARAM)
    store(param_address, offset, param, PARAM)
    if KEPT == "master_param":
        store(kept_address, offset, param, "float32")
    elif KEPT == "kahan_comp":
        store(kept_address, offset, param - nearest(param, PARAM), PARAM)
    for i in static_range(len(STATES)):
        if STATES[i] is not None:
            state = states[i]
            if STOCHASTIC and STATES[i] in HALVES:
                random = load(bits + RANDOM * (1 + i), lane, "uint16")
                state = stochastic(np.float32(state), random, STATES[i])
            if STATES[i] in quantized.CODES:
                store(values + VALUES * i, lane, np.float32(state), "float32")
            else:
                store(state_addresses[i], offset, state, STATES[i])
    if EMA is not None:
        if KEPT is None and PARAM in HALVES:
            param = nearest(param, PARAM)
        ema = COMPUTE(load(ema_address, offset, EMA))
        store(ema_address, offset, lerp(ema, param, ema_weight), EMA)


def update(
    args, program, UPDATE, PARAM, GRAD, UNSCALE, STATES, KEPT, EMA, STOCHASTIC, QUANTIZED, COMPUTE, N_SCALARS,
    CHUNK_SIZE,
):  # fmt: skip
    """Apply the rule to one chunk of one tensor: each stream is read once and written once, the gradient if UNSCALE."""
    rows_ptr, grads_ptr, scalars_ptr, control_ptr, chunks_ptr, first_tensor = arguments(args, 6)
    row = load(chunks_ptr, 2 * program, "int32")
    chunk = load(chunks_ptr, 2 * program + 1, "int32")
    tensor = first_tensor + row
    grad_address = load(grads_ptr, tensor, "int64")
    if (grad_address == 0) | (load(control_ptr, 1, "float64") != 0):
        return

    # In locals before the loop, which is a loop of vectors only then.
    row_ptr = rows_ptr + 8 * row * (7 + len(STATES))
    numel = load(row_ptr, 0, "int64")
    param_address = load(row_ptr, 4, "int64")
    state_addresses = ()
    scale_addresses = ()
    for i in static_range(len(STATES)):
        state_address = load(row_ptr, 5 + i, "int64")
        state_addresses += (state_address,)
        scale_addresses += (state_address + quantized.first_scale(numel),)
    kept_address = load(row_ptr, 5 + len(STATES), "int64")
    ema_address = load(row_ptr, 6 + len(STATES), "int64")
    grad_factor = COMPUTE(load(control_ptr, 0, "float64"))
    unscale = load(control_ptr, 2, "float64") if GRAD == "float64" else COMPUTE(load(control_ptr, 2, "float64"))
    first_scalar = tensor * (N_SCALARS + 1)
    ema_weight = COMPUTE(load(scalars_ptr, first_scalar + N_SCALARS, "float64"))
    scalars = ()
    for i in static_range(N_SCALARS):
        scalars += (COMPUTE(load(scalars_ptr, first_scalar + i, "float64")),)
    first = chunk * CHUNK_SIZE
    stop = min(numel, first + CHUNK_SIZE)
    shift = bits = values = 0
    if STOCHASTIC:
        number, seed, place = load(row_ptr, 1, "int64"), load(row_ptr, 2, "int64"), load(row_ptr, 3, "int64")
        step = np.int64(load(control_ptr, 3, "float64"))
        shift = (place + first) % 8
        bits = scratch(RANDOM * (1 + len(STATES)))
    if QUANTIZED:
        values = scratch(VALUES * len(STATES))

    tile = quantized.BLOCK if QUANTIZED else TILE if STOCHASTIC else CHUNK_SIZE
    for start in range(first, stop, tile):
        tile_stop = min(start + tile, stop)
        if STOCHASTIC:
            draw = (seed, number, step, (place + start) // 8)
            if PARAM in HALVES and KEPT is None:
                random_bits(bits, draw, 0, shift + tile_stop - start)
            for i in static_range(len(STATES)):
                if STATES[i] in NARROW:
                    random_bits(bits + RANDOM * (1 + i), draw, 1 + i, shift + tile_stop - start)
        scales = ()
        for i in static_range(len(STATES)):
            if STATES[i] in quantized.CODES:
                scales += (load(scale_addresses[i], start // quantized.BLOCK, "float32"),)
            else:
                scales += (np.float32(0),)
        for offset in range(start, tile_stop):
            update_element(
                param_address, grad_address, state_addresses, scales, kept_address, ema_address, scalars, grad_factor,
                unscale, ema_weight, bits + 2 * shift, values, offset - start, offset, UPDATE, PARAM, GRAD, UNSCALE,
                STATES, KEPT, EMA, STOCHASTIC, COMPUTE,
            )  # fmt: skip
        for i in static_range(len(STATES)):
            if STATES[i] in quantized.CODES:
                quantized.encode(
                    state_addresses[i], scale_addresses[i], values + VALUES * i, bits + RANDOM * (1 + i) + 2 * shift,
                    start, tile_stop - start, STATES[i], STOCHASTIC,
                )  # fmt: skip
