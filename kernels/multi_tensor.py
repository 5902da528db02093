"""The two generic kernels. Every optimizer's step is one launch of `prepare` and, for each signature, one of `update`.

Where the norm of the gradients is asked for, `gate.sum_squares` comes before them.

Tensors are reached through tables of addresses (`fusedopt.engines` builds them), so the number of launches
depends neither on the number of tensors nor on their sizes.
"""

import triton
import triton.language as tl

from . import quantized
from .arithmetic import lerp
from .gate import decide
from .rounding import (
    from_bits,
    load,
    nearest,
    random_bits,
    store,
    store_apart,
    store_bits,
    to_bits_stochastic,
    with_compensation,
    with_master,
)


@triton.jit
def load_number(address, absent):
    """The fp32 at an odd address less one, the fp64 at an even one, `absent` at 0; in float64."""
    is_fp32 = address % 2 == 1
    is_fp64 = (address != 0) & (address % 2 == 0)
    fp32 = tl.load((address - 1).to(tl.pointer_type(tl.float32)), mask=is_fp32, other=0.0)
    fp64 = tl.load(address.to(tl.pointer_type(tl.float64)), mask=is_fp64, other=0.0)
    return tl.where(is_fp32, fp32.to(tl.float64), tl.where(is_fp64, fp64, absent))


@triton.jit
def store_number(address, value):
    """Where `load_number` read; nowhere at 0."""
    is_fp32 = address % 2 == 1
    is_fp64 = (address != 0) & (address % 2 == 0)
    tl.store((address - 1).to(tl.pointer_type(tl.float32)), value.to(tl.float32), mask=is_fp32)
    tl.store(address.to(tl.pointer_type(tl.float64)), value, mask=is_fp64)


def _rule_name(function) -> str:
    return f"{function.__module__.rpartition('.')[2]}_{function.__name__}"


@triton.jit(
    repr=lambda specialization: f"fusedopt_prepare_{_rule_name(specialization.constants['SCALARS'])}",
    do_not_specialize=["n_tensors", "n_partials", "rounding_advance"],
    # What comes with a step, from the user too, may lie anywhere.
    do_not_specialize_on_alignment=[
        "grad_scale_ptr",
        "found_inf_ptr",
        "partials_ptr",
        "grad_norm_ptr",
        "skipped_steps_ptr",
        "rounding_step_ptr",
    ],
)
def prepare(
    groups_ptr,  # int64 [n_tensors]: the param group of each tensor
    grads_ptr,  # int64 [n_tensors]: address of the gradient, 0 = none in this step
    scalar_states_ptr,  # int64 [n_tensors, N_SCALAR_STATES + 1]: addresses of 0-d states, +1 for fp32, 0 = absent
    hyper_ptr,  # float64 [groups, N_HYPER + 1]: the rule's, then ema_decay
    hyper_tensors_ptr,  # int64 [groups, N_HYPER + 1]: address of a device tensor, +1 for fp32, 0 = take hyper_ptr's
    limits_ptr,  # float64 [3]: max_grad_norm (negative = none), skip_nonfinite, skip_grad_norm (infinite = none)
    limit_tensors_ptr,  # int64 [3]: as hyper_tensors_ptr
    scalars_ptr,  # float64 [n_tensors, N_SCALARS + 1]: written
    control_ptr,  # float64 [4]: written: what gradients are multiplied by, whether the step is skipped, 1 / grad_scale,
    # how many steps have been rounded at random, this one included
    n_tensors: tl.int64,
    # Up to here the arguments stay the same for all steps; these do not:
    grad_scale_ptr,  # fp32: what the gradients are divided by
    found_inf_ptr,  # fp32: not 0 = skip this step
    partials_ptr,  # float64 [n_partials, 2]: written by sum_squares
    grad_norm_ptr,  # float64: written
    skipped_steps_ptr,  # int64: advanced
    rounding_step_ptr,  # int64: advanced
    n_partials: tl.int64,
    rounding_advance: tl.int64,  # 0 where another launch has advanced it
    SCALARS: tl.constexpr,
    N_HYPER: tl.constexpr,
    N_SCALAR_STATES: tl.constexpr,
    N_SCALARS: tl.constexpr,
    HYPER_TENSORS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Advance the per-tensor states and compute each tensor's scalars, one tensor a lane, in float64.

    The rule's states are followed by whether a tensor's average has begun, the rule's scalars by the weight of its next
    update, which follows from that.
    """
    limits = ()
    for i in tl.static_range(3):
        limit = tl.load(limits_ptr + i)
        limits += (load_number(tl.load(limit_tensors_ptr + i), limit) if HYPER_TENSORS else limit,)
    unscale, factor, skip, grad_norm = decide(
        limits, grad_scale_ptr, found_inf_ptr, partials_ptr, n_partials, BLOCK_SIZE
    )
    if tl.program_id(0) == 0:
        tl.store(control_ptr, factor)
        tl.store(control_ptr + 1, skip.to(tl.float64))
        tl.store(control_ptr + 2, unscale)
        tl.store(grad_norm_ptr, grad_norm)
        tl.store(skipped_steps_ptr, tl.load(skipped_steps_ptr) + skip.to(tl.int64))
        rounding_step = tl.load(rounding_step_ptr) + tl.where(skip, 0, rounding_advance)
        tl.store(rounding_step_ptr, rounding_step)
        tl.store(control_ptr + 3, rounding_step.to(tl.float64))

    tensors = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = tensors < n_tensors
    # Not `& (skip == 0)`: some interpreters make integers of a mask and a scalar, and load nothing with them.
    mask = mask & (tl.where(skip, 0, tl.load(grads_ptr + tensors, mask=mask, other=0)) != 0)
    groups = tl.load(groups_ptr + tensors, mask=mask, other=0)

    hyper = ()
    for i in tl.static_range(N_HYPER + 1):
        # Lanes without a tensor read group 0, so that they compute with valid numbers.
        value = tl.load(hyper_ptr + groups * (N_HYPER + 1) + i)
        if HYPER_TENSORS:
            value = load_number(tl.load(hyper_tensors_ptr + groups * (N_HYPER + 1) + i), value)
        if i < N_HYPER:
            hyper += (value,)
        else:
            ema_decay = value

    addresses = ()
    scalar_states = ()
    ones = tl.full([BLOCK_SIZE], 1.0, tl.float64)
    scalar_states_ptr += tensors * (N_SCALAR_STATES + 1)
    for i in tl.static_range(N_SCALAR_STATES):
        address = tl.load(scalar_states_ptr + i, mask=mask, other=0)
        addresses += (address,)
        scalar_states += (load_number(address, ones),)
    ema_begun_address = tl.load(scalar_states_ptr + N_SCALAR_STATES, mask=mask, other=0)
    ema_begun = load_number(ema_begun_address, ones)
    ema_weight = tl.where(ema_begun == 0, 1.0, 1 - ema_decay)

    scalars, scalar_states = SCALARS(hyper, scalar_states)
    tl.static_assert(len(scalars) == N_SCALARS, "the rule has another number of scalars than its reference")
    tl.static_assert(len(scalar_states) == N_SCALAR_STATES, "the rule has another number of scalar states")

    for i in tl.static_range(N_SCALAR_STATES):
        store_number(addresses[i], scalar_states[i])
    store_number(ema_begun_address, ones)
    scalars_ptr += tensors * (N_SCALARS + 1)
    for i in tl.static_range(N_SCALARS):
        tl.store(scalars_ptr + i, scalars[i] + tl.zeros_like(hyper[0]), mask=mask)
    tl.store(scalars_ptr + N_SCALARS, ema_weight, mask=mask)


@triton.jit
def update_tile(
    param_address,
    grad_address,
    state_addresses,
    scale_addresses,
    kept_address,
    ema_address,
    scalars,
    grad_factor,
    unscale,
    ema_weight,
    draw,
    first,
    start,
    lanes,
    draw_lanes,
    stop,
    UPDATE: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    UNSCALE: tl.constexpr,
    STATES: tl.constexpr,
    KEPT: tl.constexpr,
    EMA: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COMPUTE: tl.constexpr,
    CONTIGUITY: tl.constexpr,
    ALIGN: tl.constexpr,
    GRAD_ALIGN: tl.constexpr,
):
    """One block of elements of every stream: load, apply the rule, store."""
    offsets = start + lanes
    mask = offsets < stop
    if len(lanes.shape) == 2:  # the addresses of a thread are then one and constants, which takes fewer registers
        first += start
        offsets = lanes
    # The alignment hint belongs to the cast that makes the pointer, so every caller casts anew.
    param_ptr = tl.multiple_of(param_address.to(tl.pointer_type(PARAM)), ALIGN) + first
    grad_ptr = tl.multiple_of(grad_address.to(tl.pointer_type(GRAD)), GRAD_ALIGN) + first
    param = load(param_ptr + offsets, mask, COMPUTE)
    # An fp64 gradient of an fp32 parameter is unscaled in fp64.
    scaled_grad = load(grad_ptr + offsets, mask, tl.float64 if GRAD == tl.float64 else COMPUTE)
    grad = grad_factor * scaled_grad.to(COMPUTE)
    state_ptrs = ()
    states = ()
    for i in tl.static_range(len(STATES)):
        if STATES[i] is None:
            state_ptrs += (param_ptr,)
            states += (param,)
        else:
            state_ptr = tl.multiple_of(state_addresses[i].to(tl.pointer_type(STATES[i])), ALIGN) + first
            state_ptrs += (state_ptr,)
            if STATES[i].primitive_bitwidth == 8:
                codes = tl.load(state_ptr + offsets, mask=mask)
                scales = quantized.load_scales(scale_addresses[i], start, stop, offsets)
                states += (quantized.decode(codes, scales, STATES[i]).to(COMPUTE),)
            else:
                states += (load(state_ptr + offsets, mask, COMPUTE),)
    if KEPT == "master_param":
        kept_ptr = tl.multiple_of(kept_address.to(tl.pointer_type(tl.float32)), ALIGN) + first
        param = with_master(param, load(kept_ptr + offsets, mask, COMPUTE), PARAM)
    elif KEPT == "kahan_comp":
        kept_ptr = tl.multiple_of(kept_address.to(tl.pointer_type(PARAM)), ALIGN) + first
        param = with_compensation(param, load(kept_ptr + offsets, mask, COMPUTE), PARAM)
    if UNSCALE:  # not before the loads above, which would have to wait for it
        unscaled_grad = unscale.to(scaled_grad.dtype) * scaled_grad
        if GRAD_ALIGN == ALIGN:
            store(grad_ptr + offsets, unscaled_grad, mask)
        else:
            store_apart(grad_ptr + offsets, unscaled_grad, mask, CONTIGUITY)

    param, states = UPDATE(param, grad, states, scalars, STATES)
    tl.static_assert(len(states) == len(STATES), "the rule returns another number of states than the class has")

    if STOCHASTIC and PARAM.primitive_bitwidth == 16 and KEPT is None:
        bits = to_bits_stochastic(param, random_bits(draw, 0, start, draw_lanes), PARAM)
        store_bits(param_ptr + offsets, bits, mask)
        param = from_bits(bits, PARAM)
    else:
        store(param_ptr + offsets, param, mask)
    if KEPT == "master_param":
        store(kept_ptr + offsets, param, mask)
    elif KEPT == "kahan_comp":
        store(kept_ptr + offsets, param - nearest(param, PARAM), mask)
    for i in tl.static_range(len(STATES)):
        if STATES[i] is not None:
            if STATES[i].primitive_bitwidth == 8:
                random = random_bits(draw, 1 + i, start, draw_lanes) if STOCHASTIC else None
                codes, scales = quantized.encode(states[i], mask, random, STATES[i], ALIGN == 16)
                tl.store(state_ptrs[i] + offsets, codes, mask=mask)
                quantized.store_scales(scale_addresses[i], start, stop, scales)
            elif STOCHASTIC and STATES[i].primitive_bitwidth == 16:
                bits = to_bits_stochastic(states[i], random_bits(draw, 1 + i, start, draw_lanes), STATES[i])
                store_bits(state_ptrs[i] + offsets, bits, mask)
            else:
                store(state_ptrs[i] + offsets, states[i], mask)
    if EMA is not None:
        ema_ptr = tl.multiple_of(ema_address.to(tl.pointer_type(EMA)), ALIGN) + first
        if KEPT is None and PARAM.primitive_bitwidth == 16:
            param = nearest(param, PARAM)
        store(ema_ptr + offsets, lerp(load(ema_ptr + offsets, mask, COMPUTE), param, ema_weight), mask)


@triton.jit(
    repr=lambda specialization: f"fusedopt_{_rule_name(specialization.constants['UPDATE'])}",
    do_not_specialize=["first_tensor"],
)
def update(
    rows_ptr,  # int64 [rows, 7 + len(STATES)]: numel, tensor, seed, place of the first element in the whole tensor;
    # addresses of parameter, states, KEPT, EMA, 0 = none
    grads_ptr,  # int64 [n_tensors]: address of the gradient, 0 = none in this step
    scalars_ptr,  # float64 [n_tensors, N_SCALARS + 1]: written by prepare
    control_ptr,  # float64 [4]: written by prepare
    chunks_ptr,  # int32 [programs, 2]: row, index of the chunk in its tensor
    first_tensor: tl.int64,  # the tensor of row 0
    UPDATE: tl.constexpr,
    PARAM: tl.constexpr,  # stored dtypes; STATES has None where the options leave a state out
    GRAD: tl.constexpr,
    UNSCALE: tl.constexpr,  # whether gradients are divided by grad_scale where they lie
    STATES: tl.constexpr,
    KEPT: tl.constexpr,  # the state that holds what rounding the parameter loses: "master_param", "kahan_comp", None
    EMA: tl.constexpr,  # the dtype of the average, None without one
    STOCHASTIC: tl.constexpr,  # whether streams of 16 and 8 bits are rounded at random
    QUANTIZED: tl.constexpr,  # whether any of STATES has 8 bits: int8 with a sign, uint8 without
    COMPUTE: tl.constexpr,
    N_SCALARS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    CONTIGUITY: tl.constexpr,  # elements of a thread that lie together: 16 bytes of the widest stream
):
    """Apply the rule to one chunk of one tensor: each stream is read once and written once, the gradient if UNSCALE."""
    pid = tl.program_id(0).to(tl.int64)
    row = tl.load(chunks_ptr + 2 * pid).to(tl.int64)
    chunk = tl.load(chunks_ptr + 2 * pid + 1)
    tensor = first_tensor + row
    grad_address = tl.load(grads_ptr + tensor)
    if (grad_address == 0) | (tl.load(control_ptr + 1) != 0):
        return

    row_ptr = rows_ptr + row * (7 + len(STATES))
    numel = tl.load(row_ptr)
    first = chunk.to(tl.int64) * CHUNK_SIZE
    param_address = tl.load(row_ptr + 4)
    addresses = param_address
    state_addresses = ()
    scale_addresses = ()
    for i in tl.static_range(len(STATES)):
        state_address = tl.load(row_ptr + 5 + i)
        state_addresses += (state_address,)
        scale_addresses += (state_address + quantized.first_scale(numel) + first // quantized.BLOCK * 4,)
        addresses |= state_address
    kept_address = param_address
    if KEPT is not None:
        kept_address = tl.load(row_ptr + 5 + len(STATES))
        addresses |= kept_address
    ema_address = param_address
    if EMA is not None:
        ema_address = tl.load(row_ptr + 6 + len(STATES))
        addresses |= ema_address
    grad_factor = tl.load(control_ptr).to(COMPUTE)
    unscale = tl.load(control_ptr + 2) if UNSCALE else 1.0
    scalars_ptr += tensor * (N_SCALARS + 1)
    ema_weight = tl.load(scalars_ptr + N_SCALARS).to(COMPUTE)
    scalars = ()
    for i in tl.static_range(N_SCALARS):
        scalars += (tl.load(scalars_ptr + i).to(COMPUTE),)
    draw = ()
    shift = 0
    if STOCHASTIC:
        tl.static_assert(BLOCK_SIZE % 32 == 0, "a quarter of a block must hold whole groups of eight elements")
        step = tl.load(control_ptr + 3).to(tl.int32)
        place = tl.load(row_ptr + 3) + first
        shift = (place % 8).to(tl.int32)
        draw = (tl.load(row_ptr + 2), tl.load(row_ptr + 1).to(tl.int32), step, (place >> 3).to(tl.int32))

    length = tl.minimum(numel - first, CHUNK_SIZE).to(tl.int32)
    # [0, all_aligned) has 16-byte accesses everywhere, [all_aligned, aligned) everywhere but in the gradient,
    # the rest goes element by element. `// 8 * 8` tells the compiler what `& -8` would not.
    WHOLE: tl.constexpr = quantized.BLOCK if QUANTIZED else 8
    aligned = tl.where(addresses % 16 == 0, length // WHOLE * WHOLE, 0)
    if STOCHASTIC:  # in a shard that begins within eight elements that share random numbers, a thread's would be of two
        aligned = tl.where(shift == 0, aligned, 0)
    all_aligned = tl.where(grad_address % 16 == 0, aligned, 0)
    # The tail has a block of its own shape. In one of the same shape, its loads would take the layout of the loops
    # above and its stores would not, and shared memory, with barriers, would carry the values from one to the other.
    if QUANTIZED:
        lanes = quantized.tile(BLOCK_SIZE, CONTIGUITY)
        tail_lanes = quantized.tile(BLOCK_SIZE, 1)
    else:
        lanes = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_SIZE), CONTIGUITY), CONTIGUITY)
        tail_lanes = tl.arange(0, BLOCK_SIZE // 4)
    TAIL_SIZE: tl.constexpr = tail_lanes.numel

    for start in range(0, all_aligned, BLOCK_SIZE):
        update_tile(
            param_address, grad_address, state_addresses, scale_addresses, kept_address, ema_address, scalars,
            grad_factor, unscale, ema_weight, draw, first, start, lanes, lanes, all_aligned, UPDATE, PARAM, GRAD,
            UNSCALE, STATES, KEPT, EMA, STOCHASTIC, COMPUTE, CONTIGUITY, ALIGN=16, GRAD_ALIGN=16,
        )  # fmt: skip
    for start in range(all_aligned, aligned, BLOCK_SIZE):
        update_tile(
            param_address, grad_address, state_addresses, scale_addresses, kept_address, ema_address, scalars,
            grad_factor, unscale, ema_weight, draw, first, start, lanes, lanes, aligned, UPDATE, PARAM, GRAD,
            UNSCALE, STATES, KEPT, EMA, STOCHASTIC, COMPUTE, CONTIGUITY, ALIGN=16, GRAD_ALIGN=1,
        )  # fmt: skip
    for start in range(aligned, length, TAIL_SIZE):
        update_tile(
            param_address, grad_address, state_addresses, scale_addresses, kept_address, ema_address, scalars,
            grad_factor, unscale, ema_weight, draw, first, start, tail_lanes, tail_lanes + shift, length, UPDATE, PARAM,
            GRAD, UNSCALE, STATES, KEPT, EMA, STOCHASTIC, COMPUTE, CONTIGUITY, ALIGN=1, GRAD_ALIGN=1,
        )  # fmt: skip
