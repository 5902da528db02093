"""What lies at an address: loads and stores in any dtype, scratch memory, the counter of programs."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FP16, FP32, FP64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
DTYPES = {  # in memory, when it has been loaded, bytes in memory
    "float64": (FP64, types.float64, 8),
    "float32": (FP32, types.float32, 4),
    "float16": (FP16, types.float32, 2),
    "bfloat16": (I16, types.float32, 2),
    "int64": (I64, types.int64, 8),
    "int32": (I32, types.int64, 4),
    "uint32": (I32, types.uint32, 4),
    "uint16": (I16, types.uint32, 2),
    "uint8": (I8, types.uint32, 1),
}


def static_range(*args):
    """A range that is unrolled when a kernel is specialized; this one is never called."""
    raise NotImplementedError


@intrinsic(prefer_literal=True)
def load(typing, address, index, DTYPE):
    """The element at this index of what lies at this address; a float of 16 bits as fp32."""
    stored, loaded, size = DTYPES[dtype := DTYPE.literal_value]

    def codegen(context, b, sig, args):
        value = b.load(_pointer(b, args[0], args[1], stored))
        value.align = size  # a user's tensor may lie anywhere, but for that
        if dtype == "float16":
            return b.fpext(value, FP32)
        if dtype == "bfloat16":
            return from_bf16(b, value)
        if dtype == "int32":
            return b.sext(value, I64)
        return b.zext(value, I32) if dtype in ("uint16", "uint8") else value

    return loaded(types.int64, types.int64, DTYPE), codegen


@intrinsic(prefer_literal=True)
def store(typing, address, index, value, DTYPE):
    """Round to nearest, ties to even."""
    stored, loaded, size = DTYPES[dtype := DTYPE.literal_value]

    def codegen(context, b, sig, args):
        value = args[2]
        if dtype == "float16":
            value = b.fptrunc(value, FP16)
        elif dtype == "bfloat16":
            value = to_bf16(b, value)
        elif dtype == "uint8":
            value = b.trunc(value, I8)
        b.store(value, _pointer(b, args[0], args[1], stored)).align = size
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, loaded, DTYPE), codegen


@intrinsic(prefer_literal=True)
def nearest(typing, value, DTYPE):
    """What `store` into a 16-bit type and `load` make of a value."""

    def codegen(context, b, sig, args):
        if DTYPE.literal_value == "float16":
            return b.fpext(b.fptrunc(args[0], FP16), FP32)
        return from_bf16(b, to_bf16(b, args[0]))

    return types.float32(types.float32, DTYPE), codegen


@intrinsic(prefer_literal=True)
def arguments(typing, args, COUNT):
    """The arguments of a kernel: so many int64, after the number of programs."""
    result = types.UniTuple(types.int64, COUNT.literal_value)

    def codegen(context, b, sig, args):
        values = [b.load(_pointer(b, args[0], I64(1 + i), I64)) for i in range(result.count)]
        return context.make_tuple(b, result, values)

    return result(types.int64, COUNT), codegen


@intrinsic(prefer_literal=True)
def check_count(typing, items, COUNT, WHAT):
    """Refuse to compile a tuple of another length."""
    count, what = COUNT.literal_value, WHAT.literal_value
    if len(items) != count:
        raise TypeError(f"the rule returns {len(items)} {what}, but its class has {count}")
    return types.void(items, COUNT, WHAT), lambda context, b, sig, args: context.get_dummy_value()


@intrinsic
def take(typing, address):
    """The int64 there, which becomes one more: each of the threads that ask at once gets another number."""

    def codegen(context, b, sig, args):
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), I64(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic(prefer_literal=True)
def scratch(typing, BYTES):
    """The address of so many bytes on the stack."""

    def codegen(context, b, sig, args):
        with b.goto_entry_block():
            memory = b.alloca(ir.ArrayType(I8, BYTES.literal_value))
        memory.align = 64
        return b.ptrtoint(memory, I64)

    return types.int64(BYTES), codegen


@intrinsic
def to_bits(typing, value):
    """The bits of an fp32."""
    return types.uint32(types.float32), lambda context, b, sig, args: b.bitcast(args[0], I32)


@intrinsic
def from_bits(typing, bits):
    """The fp32 of these bits."""
    return types.float32(types.uint32), lambda context, b, sig, args: b.bitcast(args[0], FP32)


@intrinsic
def where(typing, condition, x, y):
    """Both are there already, so that a loop has no branch."""
    result = typing.unify_types(x, y)

    def codegen(context, b, sig, args):
        values = [context.cast(b, value, kind, result) for value, kind in zip(args[1:], (x, y), strict=True)]
        return b.select(context.cast(b, args[0], condition, types.boolean), *values)

    return result(condition, x, y), codegen


def from_bf16(b, bits):
    """Build what widens bits."""
    return b.bitcast(b.shl(b.zext(bits, I32), I32(16)), FP32)


def to_bf16(b, value):
    """Build what rounds to nearest, ties to even, and keeps NaN."""
    bits = b.bitcast(value, I32)
    high = b.lshr(bits, I32(16))
    rounded = b.lshr(b.add(bits, b.add(b.and_(high, I32(1)), I32(0x7FFF))), I32(16))
    quiet_nan = b.or_(high, I32(0x40))
    return b.trunc(b.select(b.fcmp_unordered("uno", value, value), quiet_nan, rounded), I16)


def _pointer(b, address, index, stored):
    return b.gep(b.inttoptr(address, stored.as_pointer()), [index], inbounds=True)
