"""Parts of a graph are run in order, and a value goes when nothing to come reads it."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from toys import Tower, randomize, tokens

import qwt_fx
from qwt_fx.graph.aten import LINEAR
from qwt_fx.graph.graph_info import graph_info
from qwt_fx.graph.nodes import find_node, is_call
from qwt_fx.graph.runner import (
    BlockRunner,
    computed,
    evaluate,
    execute,
    nodes_between,
    placeholders,
    run_all,
    start,
    steps,
)

X = tokens(4, 6, seed=0)


def _tower() -> GraphModule:
    return qwt_fx.capture(randomize(Tower(2)), (X,))


def test_the_whole_graph_in_parts_is_the_graph() -> None:
    gm = _tower()
    nodes = computed(gm)
    with torch.no_grad():
        wanted = gm(X)
        (output,) = run_all(gm, X)
        assert torch.equal(output, wanted)
        middle = find_node(gm, graph_info(gm).blocks[0].output)
        first = nodes_between(gm, (), middle)
        assert first == nodes[: nodes.index(middle) + 1]
        env = evaluate(gm, first, start(gm, X))
        rest = nodes_between(gm, env, nodes[-1])
        assert rest == nodes[nodes.index(middle) + 1 :]
        (output,) = evaluate(gm, rest, env)[nodes[-1]]
        assert torch.equal(output, wanted)


def test_what_is_known_is_not_run_again() -> None:
    gm = _tower()
    block = graph_info(gm).blocks[1]
    source, result = find_node(gm, block.input), find_node(gm, block.output)
    nodes = computed(gm)
    between = nodes[nodes.index(source) + 1 : nodes.index(result) + 1]
    assert nodes_between(gm, {source}, result) == between
    assert nodes_between(gm, {result}, result) == []


def test_a_value_is_held_exactly_as_long_as_a_node_to_come_reads_it() -> None:
    gm = _tower()
    nodes = computed(gm)
    kept = next(n for n in nodes if is_call(n, {LINEAR}))
    env = start(gm, X)
    at = {node: index for index, node in enumerate(nodes)}
    with torch.no_grad():
        for node in steps(gm, nodes, env, keep={kept}):
            expected = {
                n
                for n in (*placeholders(gm), *nodes[: at[node]])
                if any(at[user] >= at[node] for user in n.users) or (n is kept)
            }
            assert set(env) == expected
    assert set(env) == {kept, nodes[-1]}


def test_a_runner_brings_what_is_held_up_to_date_where_the_graph_was_changed() -> None:
    gm = _tower()
    info = graph_info(gm)
    end = find_node(gm, info.blocks[0].output)
    norm = next(user for user in end.users if "layer_norm" in str(user.target))
    runner = BlockRunner(gm, [X, X + 1])
    with torch.no_grad():
        runner.advance(norm)
        before = [(env[end], env[norm]) for env in runner.envs]
        runner.revise(norm, lambda value: 2 * value)
        for env, (residual, value) in zip(runner.envs, before, strict=True):
            assert torch.equal(env[norm], 2 * value)
            assert torch.equal(env[end], residual)  # beside it, not made of it


def test_a_node_reads_the_value_in_place_of_a_parameter() -> None:
    gm = _tower()
    linear = next(n for n in computed(gm) if is_call(n, {LINEAR}))
    source, weight = linear.all_input_nodes[:2]
    assert isinstance(weight, Node) and weight.op == "get_attr"
    value = torch.randn(3, 16)
    env = {source: value, weight: torch.zeros(16, 16)}
    bias = execute(gm, linear.all_input_nodes[2], {})
    assert torch.equal(execute(gm, linear, env), bias.expand(3, -1))
