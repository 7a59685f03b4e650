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


class _Point:
    """The instructions for one point of the volume."""

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        self.builder = builder
        volume, self.offset, self.stride_y, self.stride_z = args[:4]
        self.data = context.make_array(signature.args[0])(context, builder, volume).data
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

    def row(self, y: int, z: int, first: int, lanes: int) -> ir.Value:
        """Pointer to `lanes` numbers of a row of taps, from the number `first` on."""
        place = self.builder.add(self.offset, ir.Constant(self.offset.type, first))
        for stride, steps in ((self.stride_y, y), (self.stride_z, z)):
            place = self.builder.add(place, self.builder.mul(stride, ir.Constant(stride.type, steps)))
        return self.builder.bitcast(self.builder.gep(self.data, [place]), _vector(lanes).as_pointer())

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


@intrinsic
def write(typingctx, volume, offset, stride_y, stride_z, fx, fy, fz, real, imaginary, weight):  # type: ignore[no-untyped-def]
    """Add (real, imaginary, weight) to a volume of three numbers a voxel: the adjoint of reading each of them."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        point = _Point(context, builder, signature, args)
        weights = point.polynomial(WEIGHTS)
        three = ir.Constant(_vector(4), ir.Undefined)
        for lane, part in enumerate(args[7:10]):
            three = builder.insert_element(three, part, ir.Constant(ir.IntType(32), lane))
        lanes = list(range(3 * TAPS))
        pieces = []
        for first, last in ((0, 8), (8, 12)):
            along_x = point.shuffle(weights, [lane // 3 for lane in lanes[first:last]])
            value = point.shuffle(three, [lane % 3 for lane in lanes[first:last]])
            pieces.append((first, last - first, builder.fmul(along_x, value, flags=_FAST)))
        for z in range(TAPS):
            for y in range(TAPS):
                for first, count, piece in pieces:
                    across = builder.fmul(
                        point.splat(weights, TAPS + y, count), point.splat(weights, 2 * TAPS + z, count), flags=_FAST
                    )
                    place = point.row(y, z, first, count)
                    builder.store(point.multiply_add(across, piece, builder.load(place, align=4)), place, align=4)
        return context.get_dummy_value()

    return _returned(0, volume)(types.float32, types.float32, types.float32), codegen
