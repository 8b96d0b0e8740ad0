"""What a compiled kernel's assembly says about its loops: PTX, and AMD's GCN.

A loop is a natural one: a jump back to a block that every way to the jump has passed. (A block that the compiler has
merely put out of the way jumps back too.)
"""

import re

_LABEL = re.compile(r"\s*([$.\w]+):\s*(?:[;/].*)?$")
_JUMP = re.compile(r"\b(bra(?:\.uni)?|s_branch|s_cbranch_\w+)\s+([$.\w]+)")
_END = re.compile(r"\b(ret|exit|s_endpgm)\b")
_BARRIER = re.compile(r"\b(bar\.sync|barrier\.sync|s_barrier)\b")


def barriers_in_loops(assembly: str) -> int:
    """Barriers inside loops; an unrolled body counts as often as it is written."""
    blocks, successors = _flow_graph(assembly.splitlines())
    inside = set().union(*_loops(successors))
    return sum(bool(_BARRIER.search(line)) for block in inside for line in blocks[block])


def _flow_graph(lines: list[str]) -> tuple[list[list[str]], list[set[int]]]:
    """The basic blocks in order, the first one the entry, and where each may go."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in lines:
        if label := _LABEL.match(line):
            blocks.append([])
            labels[label[1]] = len(blocks) - 1
        blocks[-1].append(line)
        if _JUMP.search(line) or _END.search(line):
            blocks.append([])
    successors: list[set[int]] = []
    for index, block in enumerate(blocks):
        last = block[-1] if block else ""
        jump = _JUMP.search(last)
        conditional = jump is not None and (jump[1].startswith("s_cbranch") or "@" in last.partition("bra")[0])
        after = {index + 1} if index + 1 < len(blocks) else set()
        if jump is not None:
            target = {labels[jump[2]]} if jump[2] in labels else set()
            successors.append(target | (after if conditional else set()))
        else:
            successors.append(set() if _END.search(last) and "@" not in last else after)
    return blocks, successors


def _loops(successors: list[set[int]]) -> list[set[int]]:
    """The blocks of every natural loop."""
    reached, waiting = {0}, [0]
    while waiting:
        fresh = successors[waiting.pop()] - reached
        reached |= fresh
        waiting.extend(fresh)
    predecessors: dict[int, set[int]] = {block: set() for block in reached}
    for block in reached:
        for target in successors[block]:
            predecessors[target].add(block)
    dominators = {block: set(reached) for block in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            found = {block} | set.intersection(*(dominators[p] for p in predecessors[block]))
            changed |= found != dominators[block]
            dominators[block] = found
    loops = []
    for block in reached:
        for head in successors[block] & dominators[block]:
            loop, waiting = {head}, [block]
            while waiting:
                member = waiting.pop()
                if member not in loop:
                    loop.add(member)
                    waiting.extend(predecessors[member])
            loops.append(loop)
    return loops
