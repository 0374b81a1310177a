"""Recipes and arguments that cannot be, and the way out."""

import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from frugax import lowbit
from frugax.lowbit import Flow, Operand, Product, Recipe, Rotation
from frugax.quant import Scaling


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: lowbit.recipe('qest4'), "'qest4': did you mean 'quest4'"),
    (lambda: Operand('int9'), "unknown format 'int9'"),
    (lambda: Operand('int8', mask='trusted'), "did you mean 'trust'"),
    (lambda: Operand(mask='clip'), "mask='clip' of format=None"),
    (lambda: Operand(source='forwards'), "did you mean 'forward'"),
    (lambda: Operand('int4_absmax'), 'give the elements of a group'),
    (
      lambda: Operand('int4_absmax', Scaling((1, 8)), stochastic=True),
      'rounds to nearest alone',
    ),
    (lambda: Operand('masked_e8m3', stochastic=True), 'to nearest alone'),
    (lambda: Operand('masked_e9m3'), "did you mean 'masked_e"),
    (lambda: Operand('int4', keep='2:3'), "did you mean '2:4'"),
    (lambda: Operand('rise4', keep='2:4'), 'that has a zero'),
    (
      lambda: Product(result=Operand('int8', mask='clip')),
      'as the result of a product',
    ),
    (lambda: Recipe(weights='int5'), "unknown format of weights 'int5'"),
    (lambda: lowbit.flow('cot'), "unknown flow 'cot': did you mean 'coat'"),
    (lambda: Flow(Operand('masked_e8m3')), 'between linear layers'),
    (lambda: Flow(gradient=Operand('int8', mask='clip')), 'between linear'),
    (lambda: Rotation(12), 'block=12'),
    (lambda: Rotation(signs='new'), "unknown signs 'new'"),
    (lambda: Rotation(along='tokens'), "unknown axis to rotate along 'tokens'"),
    (lambda: Recipe(residuals='code'), "did you mean 'codes'"),
    (
      lambda: Recipe(Product(Operand(source='forward'))),
      'for the right operand of a gradient',
    ),
    (
      lambda: Recipe(weight_grad=Product(Operand('int8', mask='clip'))),
      'belongs to an operand of the forward',
    ),
    (
      lambda: Recipe(Product(rotation=Rotation(signs='fresh'))),
      'fixed signs or none',
    ),
    (
      lambda: Recipe(weight_grad=Product(rotation=Rotation(along='rows'))),
      "along='contracted'",
    ),
  ],
)
def test_bad_recipes(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  ('x', 'arguments', 'message'),
  [
    (jnp.ones((2, 3), jnp.int32), {}, 'not int32'),
    (jnp.ones((2, 3)), {'out_sharding': P()}, 'with_sharding_constraint'),
  ],
)
def test_bad_arguments(x, arguments, message):
  dot = lowbit.dot_general(lowbit.recipe('int8'))
  with pytest.raises(ValueError, match=message):
    dot(x, jnp.ones((3, 2)), (((1,), (0,)), ((), ())), **arguments)
