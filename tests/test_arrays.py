"""Declarations: initial values, shardings and paths."""

from __future__ import annotations

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qaperso import arrays, mesh
from qaperso.arrays import ArraySpec
from qaperso.errors import UserError

RULES = [(":(embed)$", "fsdp"), (":(heads|kv_heads|mlp|vocab)$", "tensor"), (":classes$", "fsdp")]


def specs() -> dict:
    return {
        "a": ArraySpec((4, 6), ("embed", "mlp"), 0.5),
        "layers": {
            "q": ArraySpec((2, 4, 8), ("layers", "embed", "heads"), 0.5),
            "norm": ArraySpec((4,), (None,), "ones"),
        },
        "count": ArraySpec((3,), ("classes",), dtype=jnp.int32),
    }


def test_rank_of_axes_is_checked() -> None:
    with pytest.raises(ValueError, match="differ in rank"):
        ArraySpec((2, 3), ("embed",))


def test_fan_in_is_one_over_the_root_of_the_product() -> None:
    assert arrays.fan_in(4, 25) == 0.1


def test_paths_abstract_values_and_bytes() -> None:
    tree = specs()
    assert list(arrays.flat(tree, arrays.is_spec)) == ["a", "count", "layers/norm", "layers/q"]
    assert arrays.map_specs(lambda path, s: (path, s.shape), tree)["layers"]["norm"] == ("layers/norm", (4,))
    shapes = arrays.abstract(tree)
    assert (shapes["count"].shape, shapes["count"].dtype) == ((3,), jnp.int32)
    assert arrays.tree_bytes(tree) == 4 * (24 + 64 + 4 + 3)
    assert arrays.tree_bytes({"half": ArraySpec((5, 2), (None, None), dtype=jnp.bfloat16)}) == 20


def test_initial_values() -> None:
    tree = specs() | {
        "wide": ArraySpec((200, 200), (None, None), 0.02),
        "half": ArraySpec((2,), (None,), 1.0, jnp.bfloat16),
    }
    values = arrays.initialise(tree, jax.random.key(0))
    assert (values["layers"]["norm"] == 1).all() and (values["count"] == 0).all()
    assert values["count"].dtype == jnp.int32 and values["half"].dtype == jnp.bfloat16
    # 40,000 draws: the standard error of the deviation is 0.35% of it.
    assert abs(float(values["wide"].std()) / 0.02 - 1) < 0.02 and abs(float(values["wide"].mean())) < 5e-4


def test_a_leaf_does_not_depend_on_its_neighbours() -> None:
    key = jax.random.key(3)
    whole = arrays.initialise(specs(), key)
    alone = arrays.initialise({"layers": {"q": specs()["layers"]["q"]}}, key)
    np.testing.assert_array_equal(whole["layers"]["q"], alone["layers"]["q"])
    same_shape = arrays.initialise({"x": specs()["a"], "y": specs()["a"]}, key)
    assert (same_shape["x"] != same_shape["y"]).all()
    other_key = arrays.initialise(specs(), jax.random.key(4))
    assert (whole["a"] != other_key["a"]).all()


def partition(tree: dict, rules: list, sizes: tuple[int, int, int] = (2, 2, 2)) -> dict:
    return jax.tree.map(lambda s: s.spec, arrays.shardings(tree, mesh.make_mesh(*sizes), rules))


def test_rules_give_mesh_axes() -> None:
    found = partition(specs(), RULES)
    assert found["a"] == PartitionSpec("fsdp", "tensor")
    assert found["layers"]["q"] == PartitionSpec(None, "fsdp", "tensor")
    assert found["layers"]["norm"] == PartitionSpec(None)
    # Three classes over two devices do not divide: the dimension stays whole.
    assert found["count"] == PartitionSpec(None)


def test_first_matching_rule_counts() -> None:
    tree = {"head": ArraySpec((4, 8), ("embed", "vocab"))}
    assert partition(tree, [("^head:embed$", "tensor"), ("embed", "fsdp")])["head"] == PartitionSpec("tensor", None)
    assert partition(tree, [("embed", "fsdp"), ("^head:embed$", "tensor")])["head"] == PartitionSpec("fsdp", None)
    # A first match of None keeps the dimension whole, whatever a later rule says.
    assert partition(tree, [("^head:", None), ("embed", "fsdp")])["head"] == PartitionSpec(None, None)


def test_no_mesh_axis_is_used_twice() -> None:
    tree = {"square": ArraySpec((4, 4), ("embed", "embed"))}
    assert partition(tree, RULES)["square"] == PartitionSpec("fsdp", None)
    # A dimension that could not take the axis leaves it to the next one.
    tree = {"square": ArraySpec((3, 4), ("embed", "embed"))}
    assert partition(tree, RULES)["square"] == PartitionSpec(None, "fsdp")


def test_every_dimension_of_the_models_that_divides_is_spread() -> None:
    from qaperso.models import decoder, lora

    found = partition(decoder.declare(helpers.model()), RULES, (1, 4, 2))
    assert found["embed"] == PartitionSpec("tensor", "fsdp") and found["head"] == PartitionSpec("fsdp", "tensor")
    assert found["layers"]["down"] == PartitionSpec(None, "tensor", "fsdp")
    found = partition(lora.declare(helpers.model(), 3), RULES, (1, 4, 2))
    assert found["o"] == {"a": PartitionSpec(None, "tensor", None), "b": PartitionSpec(None, None, "fsdp")}


@pytest.mark.parametrize(
    "rule, message",
    [
        (("embed", "model"), "sharding rule 'embed' names mesh axis 'model'; the mesh has"),
        (("em(bed", "fsdp"), r"sharding rule 'em\(bed' is not a regular expression"),
    ],
)
def test_bad_rules_are_the_users_error(rule: tuple[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        arrays.shardings(specs(), mesh.make_mesh(8, 1, 1), [rule])


def test_a_kernel_is_gathered_but_over_the_tensor_axis() -> None:
    x, axes = jnp.arange(64.0).reshape(8, 8), ("embed", "mlp")
    assert arrays.gather_kernel(x, axes) is x, "without a mesh nothing happens"
    made = mesh.make_mesh(2, 2, 2)
    apart = NamedSharding(made, PartitionSpec("fsdp", "tensor"))
    with jax.set_mesh(made):
        whole = jax.jit(lambda x: arrays.gather_kernel(x, axes))(jax.device_put(x, apart))
        odd = jax.jit(lambda x: arrays.gather_kernel(x, axes))(x[:, :3])
        gradient = jax.jit(jax.grad(lambda x: (arrays.gather_kernel(x, axes) ** 2).sum()), out_shardings=apart)(x)
    assert whole.sharding.spec == PartitionSpec(None, "tensor")
    assert odd.sharding.is_fully_replicated, "three columns do not divide by two"
    np.testing.assert_array_equal(whole, x)
    np.testing.assert_array_equal(gradient, 2 * x)


def test_constrain_batch() -> None:
    x = jnp.arange(16.0).reshape(2, 8)
    assert arrays.constrain_batch(x, 1) is x, "without a mesh nothing happens"
    with jax.set_mesh(mesh.make_mesh(2, 2, 2)):
        spread = jax.jit(lambda x: arrays.constrain_batch(x, 1))(x)
        odd = x[:, :6]
        assert arrays.constrain_batch(odd, 1) is odd, "six rows do not divide by four"
    assert spread.sharding.spec == PartitionSpec(None, ("data", "fsdp"))
    np.testing.assert_array_equal(spread, x)
