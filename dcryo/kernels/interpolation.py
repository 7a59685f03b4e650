"""Reading and writing between the grid points of a flat float32 volume, as vector instructions.

A compiler left to itself reads the 64 grid points of the kernel one by one. Here the code of one point is laid down
explicitly: four neighbours along x are one vector, sixteen vectors make a point. The volume's last axis is the fastest;
`offset` is the place of the first number of the lowest tap on each axis, strides are in numbers. fx, fy and fz are
fractions of a grid step from the second tap.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from dcryo.kernels.gridding import SLOPES, TAPS, WEIGHTS

_FLOAT = ir.FloatType()
_LANES = 4 * TAPS  # the taps of x, y and z, and as many unused
_FAST = ("fast",)


def _vector(lanes: int) -> ir.VectorType:
    return ir.VectorType(_FLOAT, lanes)


def _constant(values: list[float]) -> ir.Constant:
    return ir.Constant(_vector(len(values)), [ir.Constant(_FLOAT, float(value)) for value in values])


class _Rows:
    """Where the taps of a point are in the volume."""

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        self.builder = builder
        volume, self.offset, self.stride_y, self.stride_z = args[:4]
        self.data = context.make_array(signature.args[0])(context, builder, volume).data

    def row(self, y: int, z: int, first: int, lanes: int) -> ir.Value:
        """Pointer to `lanes` numbers of a row of taps, from the number `first` on."""
        place = self.builder.add(self.offset, ir.Constant(self.offset.type, first))
        for stride, steps in ((self.stride_y, y), (self.stride_z, z)):
            place = self.builder.add(place, self.builder.mul(stride, ir.Constant(stride.type, steps)))
        return self.builder.bitcast(self.builder.gep(self.data, [place]), _vector(lanes).as_pointer())


class _Point(_Rows):
    """The instructions for one point of the volume."""

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        super().__init__(context, builder, signature, args)
        self.fractions = self._lanes_of(args[4:7])

    def _lanes_of(self, fractions: list) -> ir.Value:
        """Fractions of x, y and z less one half, each in the lanes of its taps."""
        packed = ir.Constant(_vector(_LANES), ir.Undefined)
        for axis, fraction in enumerate(fractions):
            packed = self.builder.insert_element(packed, fraction, ir.Constant(ir.IntType(32), axis))
        spread = self.shuffle(packed, [min(lane // TAPS, 2) for lane in range(_LANES)])
        return self.builder.fsub(spread, _constant([0.5] * _LANES), flags=_FAST)

    def shuffle(self, vector: ir.Value, lanes: list[int]) -> ir.Value:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), [ir.Constant(ir.IntType(32), n) for n in lanes])
        return self.builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value | None) -> ir.Value:
        product = self.builder.fmul(a, b, flags=_FAST)
        return product if c is None else self.builder.fadd(product, c, flags=_FAST)

    def polynomial(self, coefficients: Any) -> ir.Value:
        """Value of a polynomial per tap, (TAPS, n), at every axis: lanes x0..x3, y0..y3, z0..z3."""
        columns = [_constant([float(value) for value in column] * (_LANES // TAPS)) for column in coefficients.T]
        value = columns[0]
        for column in columns[1:]:
            value = self.multiply_add(value, self.fractions, column)
        return value

    def splat(self, vector: ir.Value, lane: int, lanes: int) -> ir.Value:
        return self.shuffle(vector, [lane] * lanes)

    def complex_sum(self, rows: ir.Value, along_x: ir.Value) -> list:
        """Real and imaginary part of a row of complex numbers weighted along x."""
        each = self.builder.fmul(rows, self.shuffle(along_x, [tap // 2 for tap in range(2 * TAPS)]), flags=_FAST)
        half = self.builder.fadd(self.shuffle(each, [0, 1, 2, 3]), self.shuffle(each, [4, 5, 6, 7]), flags=_FAST)
        pair = self.builder.fadd(self.shuffle(half, [0, 1]), self.shuffle(half, [2, 3]), flags=_FAST)
        return [self.builder.extract_element(pair, ir.Constant(ir.IntType(32), n)) for n in (0, 1)]


def _returned(count: int, volume: Any) -> Any:
    whole, real = types.intp, types.float32
    result = types.UniTuple(real, count) if count else types.void
    return lambda *more: result(volume, whole, whole, whole, real, real, real, *more)


@intrinsic
def read(typingctx, volume, offset, stride_y, stride_z, fx, fy, fz):  # type: ignore[no-untyped-def]
    """(real, imaginary) of a complex volume, two numbers a voxel."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        point = _Point(context, builder, signature, args)
        weights = point.polynomial(WEIGHTS)
        total = None
        for z in range(TAPS):
            plane = None
            for y in range(TAPS):
                values = builder.load(point.row(y, z, 0, 2 * TAPS), align=4)
                plane = point.multiply_add(point.splat(weights, TAPS + y, 2 * TAPS), values, plane)
            total = point.multiply_add(point.splat(weights, 2 * TAPS + z, 2 * TAPS), plane, total)
        return context.make_tuple(builder, signature.return_type, point.complex_sum(total, weights))

    return _returned(2, volume)(), codegen


@intrinsic
def read_slope(typingctx, volume, offset, stride_y, stride_z, fx, fy, fz):  # type: ignore[no-untyped-def]
    """(real, imaginary) of a complex volume and of its derivatives along x, y and z per grid step: eight numbers."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        point = _Point(context, builder, signature, args)
        weights, slopes = point.polynomial(WEIGHTS), point.polynomial(SLOPES)
        total = total_y = total_z = None
        for z in range(TAPS):
            plane = plane_y = None
            for y in range(TAPS):
                values = builder.load(point.row(y, z, 0, 2 * TAPS), align=4)
                plane = point.multiply_add(point.splat(weights, TAPS + y, 2 * TAPS), values, plane)
                plane_y = point.multiply_add(point.splat(slopes, TAPS + y, 2 * TAPS), values, plane_y)
            weight, slope = (point.splat(of, 2 * TAPS + z, 2 * TAPS) for of in (weights, slopes))
            total = point.multiply_add(weight, plane, total)
            total_y = point.multiply_add(weight, plane_y, total_y)
            total_z = point.multiply_add(slope, plane, total_z)
        parts = point.complex_sum(total, weights) + point.complex_sum(total, slopes)
        parts += point.complex_sum(total_y, weights) + point.complex_sum(total_z, weights)
        return context.make_tuple(builder, signature.return_type, parts)

    return _returned(8, volume)(), codegen


def _spread(context, builder, signature, args):  # type: ignore[no-untyped-def]
    """Add the arguments after the fractions, one number of a voxel each, to the grid points around."""
    point = _Point(context, builder, signature, args)
    weights, parts = point.polynomial(WEIGHTS), args[7:]
    packed = ir.Constant(_vector(4), ir.Undefined)
    for lane, part in enumerate(parts):
        packed = builder.insert_element(packed, part, ir.Constant(ir.IntType(32), lane))
    count, pieces = len(parts) * TAPS, []
    for first in range(0, count, 8):
        lanes = range(first, min(first + 8, count))
        along_x = point.shuffle(weights, [lane // len(parts) for lane in lanes])
        value = point.shuffle(packed, [lane % len(parts) for lane in lanes])
        pieces.append((first, len(lanes), builder.fmul(along_x, value, flags=_FAST)))
    for z in range(TAPS):
        for y in range(TAPS):
            for first, lanes, piece in pieces:
                across = builder.fmul(
                    point.splat(weights, TAPS + y, lanes), point.splat(weights, 2 * TAPS + z, lanes), flags=_FAST
                )
                place = point.row(y, z, first, lanes)
                builder.store(point.multiply_add(across, piece, builder.load(place, align=4)), place, align=4)
    return context.get_dummy_value()


@intrinsic
def write(typingctx, volume, offset, stride_y, stride_z, fx, fy, fz, real, imaginary, weight):  # type: ignore[no-untyped-def]
    """Add (real, imaginary, weight) to a volume of three numbers a voxel: the adjoint of reading each of them."""
    return _returned(0, volume)(types.float32, types.float32, types.float32), _spread


@intrinsic
def write_complex(typingctx, volume, offset, stride_y, stride_z, fx, fy, fz, real, imaginary):  # type: ignore[no-untyped-def]
    """Add (real, imaginary) to a complex volume, two numbers a voxel: the adjoint of `read`."""
    return _returned(0, volume)(types.float32, types.float32), _spread


def _fetched(parts: int, to_write: int) -> Any:
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        rows, byte, number = _Rows(context, builder, signature, args), ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        how = [ir.Constant(number, value) for value in (to_write, 3, 1)]
        for z in range(TAPS):
            for y in range(TAPS):
                for end in (0, parts * TAPS - 1):  # a row may lie across two lines of the cache
                    builder.call(prefetch, [builder.bitcast(rows.row(y, z, end, 1), byte), *how])
        return context.get_dummy_value()

    return codegen


@intrinsic
def before_read(typingctx, volume, offset, stride_y, stride_z):  # type: ignore[no-untyped-def]
    """Ask for what `read` or `read_slope` of a later point will need, which takes memory longer than several points
    take us. It changes no result."""
    return types.void(volume, types.intp, types.intp, types.intp), _fetched(2, to_write=0)


@intrinsic
def before_write(typingctx, volume, offset, stride_y, stride_z):  # type: ignore[no-untyped-def]
    """Ask for what `write` of a later point will need; see `before_read`."""
    return types.void(volume, types.intp, types.intp, types.intp), _fetched(3, to_write=1)
