# SPDX-License-Identifier: Apache-2.0
"""Whether a chat template goes through the parts of a message's content, found in its syntax tree as vLLM does."""

from __future__ import annotations

from jinja2 import nodes

__all__ = ["walks_content"]


def walks_content(template: nodes.Template) -> bool:
    """Return whether some loop of ``template`` runs over a message's content, under whatever name it was given."""
    names = _content_names(template)
    return any(_is_content(loop.iter, names) for loop in template.find_all(nodes.For))


def _content_names(template: nodes.Template) -> set[str]:
    """Variables that hold a content: assigned from one, or the parameter of a macro that is called ``content``."""
    names = {"content"}
    assignments = [
        (node.target.name, node.node) for node in template.find_all(nodes.Assign) if isinstance(node.target, nodes.Name)
    ]
    for _ in assignments:  # an assignment may use a later one's variable: in a loop, or in a macro
        before = len(names)
        names |= {name for name, value in assignments if _is_content(value, names)}
        if len(names) == before:
            break
    return names


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    """``message.content``, ``message["content"]``, one of ``names``, or any of these through filters or a slice."""
    match node:
        case nodes.Name():
            return node.name in names
        case nodes.Getattr():
            return node.attr == "content"
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Getitem(arg=nodes.Slice()):
            return _is_content(node.node, names)
        case nodes.Filter() if node.node is not None:
            return node.name not in ("split", "tojson", "string") and _is_content(node.node, names)
        case nodes.CondExpr():
            return any(_is_content(each, names) for each in (node.expr1, node.expr2) if each is not None)
    return False
