"""The mesh that arrays lie on, as far as a trace of them tells.

Where they are cut no trace tells, but what is made of them can be asked to be
whole along an axis. Projectors in packed blocks do: on a mesh that cuts both
sides of a gradient XLA would else gather one of them. A trace knows the mesh
under `jax.set_mesh`, or if the jitted function's arguments have shardings; by
`in_shardings` alone it does not.
"""

from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec


def mesh_of(arrays: Any) -> AbstractMesh | None:
  """The mesh of several devices on which XLA is to spread the arrays.

  Args:
    arrays: a tree of arrays.

  Returns:
    The mesh; None if none is known, or one whose axes are not all automatic.
  """
  for x in jax.tree.leaves(arrays):
    mesh = jax.typeof(x).sharding.mesh
    if mesh.size > 1 and mesh.are_all_axes_auto:
      return mesh
  return None


def lying_on(
  mesh: AbstractMesh | None, x: jax.ShapeDtypeStruct
) -> jax.ShapeDtypeStruct:
  """An array's description that tells a trace of its mesh, not of any cut.

  Args:
    mesh: of `mesh_of`.
    x: shape, dtype and whether that is a weak one.
  """
  if mesh is None:
    return x
  return jax.ShapeDtypeStruct(
    x.shape,
    x.dtype,
    sharding=NamedSharding(mesh, PartitionSpec()),
    weak_type=x.weak_type,
  )


def uncut(x: jax.Array, axis: int) -> jax.Array:
  """The same array, not cut along an axis; the others are for XLA to choose.

  On a mesh of which one axis alone has several devices nothing is asked: there
  no two axes can get in each other's way.

  Args:
    x: an array of a traced function; any other is left alone.
    axis: which axis each device shall have whole.
  """
  mesh = mesh_of(x) if isinstance(x, jax.core.Tracer) else None
  if mesh is None or sum(n > 1 for n in mesh.shape.values()) < 2:
    return x
  entries: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
  entries[axis] = None
  return jax.lax.with_sharding_constraint(
    x, NamedSharding(mesh, PartitionSpec(*entries))
  )
