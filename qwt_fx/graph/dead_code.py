"""Removal of what nothing reads.

torch.fx keeps every operator that may draw random numbers, attention among them, used or not. Nothing
here is random: dropout is gone, and attention's probability of it is 0. So a layer of a model whose
caller reads an earlier one goes, its parameters with it.
"""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node


def has_effect(node: Node) -> bool:
    """Whether a node matters even where nothing reads its value."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def remove_dead_nodes(gm: GraphModule) -> None:
    """Erase every node that has no effect and that nothing reads."""
    gm.graph.eliminate_dead_code(has_effect)


def remove_dead_code(gm: GraphModule) -> None:
    """Erase dead nodes and the modules, parameters and buffers nothing reads."""
    remove_dead_nodes(gm)
    gm.delete_all_unused_submodules()
    _drop_unread_tensors(gm)


def _drop_unread_tensors(gm: GraphModule) -> None:
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}

    def visit(module: nn.Module, prefix: str) -> None:
        for table in (module._parameters, module._buffers):
            for name in [n for n in table if prefix + n not in read]:
                del table[name]
                module._non_persistent_buffers_set.discard(name)
        for name, child in list(module.named_children()):
            if prefix + name in called:
                continue
            visit(child, f"{prefix}{name}.")
            holds = any(True for _ in child.parameters()) or any(True for _ in child.buffers())
            if not holds and not any(t.startswith(f"{prefix}{name}.") for t in called):
                delattr(module, name)

    visit(gm, "")
