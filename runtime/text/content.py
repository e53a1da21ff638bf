# SPDX-License-Identifier: Apache-2.0
"""Whether a chat template goes through the parts of a message's content, found in its syntax tree as vLLM does."""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import nodes

__all__ = ["walks_content"]

_TO_TEXT = frozenset({"split", "tojson", "string", "trim", "join"})
"""Filters whose result is a text, or no longer the content's parts."""


def walks_content(template: nodes.Template) -> bool:
    """Return whether some loop of ``template`` runs over a message's content, under whatever name it was given."""
    names = _content_names(template)
    return any(_is_content(loop.iter, names) for loop in template.find_all(nodes.For))


def _content_names(template: nodes.Template) -> set[str]:
    """Variables that hold a content: called so, assigned from one, or a macro's parameter that is given one."""
    names = {"content"}
    bindings = [*_assignments(template), *_arguments(template)]
    for _ in bindings:  # a binding may use a later one's variable: in a loop, or in a macro
        before = len(names)
        names |= {name for name, value in bindings if _is_content(value, names)}
        if len(names) == before:
            break
    return names


def _assignments(template: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    for node in template.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name):
            yield node.target.name, node.node


def _arguments(template: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    macros = {macro.name: [parameter.name for parameter in macro.args] for macro in template.find_all(nodes.Macro)}
    for call in template.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            yield from zip(macros[call.node.name], call.args, strict=False)
            yield from ((keyword.key, keyword.value) for keyword in call.kwargs)


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    """``message.content``, ``message["content"]``, ``message.get("content")``, one of ``names``, or these through a filter or slice."""
    match node:
        case nodes.Name():
            return node.name in names
        case nodes.Getattr():
            return node.attr == "content"
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Getitem(arg=nodes.Slice()):
            return _is_content(node.node, names)
        case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value="content"), *_]):
            return True
        case nodes.Filter() if node.node is not None:
            return node.name not in _TO_TEXT and _is_content(node.node, names)
        case nodes.CondExpr():
            return any(_is_content(each, names) for each in (node.expr1, node.expr2) if each is not None)
        case nodes.Or() | nodes.And():
            return _is_content(node.left, names) or _is_content(node.right, names)
    return False
