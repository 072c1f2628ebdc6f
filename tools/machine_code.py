"""The main loops of kernels on the tensor cores, in machine code as nvdisasm prints it.

A main loop is the innermost loop that has both HMMA (a product of a warp) and LDGSTS (a copy into shared memory that
arrives later). In it each multiprocessor spends nearly all of its time, so what stands there beside HMMA costs speed.
"""
import collections
import math
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOOD_PER_HMMA = 5

SECTION = re.compile(r"\.text\.(\S+):$")
LABEL = re.compile(r"([.$]\S+):$")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
# cvt.rn.tf32 is an instruction where the machine has one. cvt.rna.tf32 becomes an addition where |x| is below infinity,
# and simt::round_to_tf32 clears the last 13 bits.
CONVERSIONS = [(re.compile(r"(?!HMMA)\S*TF32"), re.compile("")), (re.compile("FSETP"), re.compile(r"\|.*\+INF")),
               (re.compile("LOP3|ULOP3"), re.compile("0xffffe000"))]

Instruction = collections.namedtuple("Instruction", "guard opcode operands")
Code = collections.namedtuple("Code", "instructions labels")  # labels: {name: index of the instruction behind it}


def find_disassembler():
    """NVIDIA's nvdisasm, as tools/setup --gpu-checks installs it, or None."""
    return next(iter(sorted((ROOT / "build" / "python" / "nvidia").glob("*/bin/nvdisasm"))), None)


def parse(text):
    """{mangled kernel: Code}"""
    kernels = {}
    code = None
    for line in text.splitlines():
        line = line.strip()
        if match := SECTION.match(line):
            code = kernels[match.group(1)] = Code([], {})
        elif code and (match := LABEL.match(line)):
            code.labels[match.group(1)] = len(code.instructions)
        elif code and (match := INSTRUCTION.match(line)):
            code.instructions.append(Instruction(*match.groups()))
    return kernels


def kind(instruction):
    return instruction.opcode.split(".")[0]


def successors(code, index):
    """The instructions that may follow one; a subroutine comes back behind its call."""
    instruction = code.instructions[index]
    conditional = instruction.guard not in (None, "PT")
    following = []
    if kind(instruction) in ("BRA", "BRX"):
        following = [code.labels[label] for label in re.findall(r"\.L\w+", instruction.operands)]
        # BRA.DIV and some forms of BRA have their condition among the operands.
        conditional = conditional or kind(instruction) == "BRA" and not instruction.operands.startswith("`")
    elif kind(instruction) not in ("EXIT", "RET"):
        conditional = True
    if conditional:
        following.append(index + 1)
    return [i for i in following if i < len(code.instructions)]


def loops(code):
    """The natural loops, as sets of instructions' indices. A branch goes back to a loop's head if the head dominates
    it: if every way from the kernel's entry to the branch leads through the head."""
    following = {0: successors(code, 0)}
    pending = [0]
    while pending:
        for i in following[pending.pop()]:
            if i not in following:
                following[i] = successors(code, i)
                pending.append(i)
    preceding = collections.defaultdict(list)
    for i, targets in following.items():
        for target in targets:
            preceding[target].append(i)

    dominators = {i: -1 for i in following}  # bit i: instruction i; -1 has all bits
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for i in sorted(preceding.keys() - {0}):
            found = -1
            for j in preceding[i]:
                found &= dominators[j]
            found |= 1 << i
            changed = changed or found != dominators[i]
            dominators[i] = found

    bodies = {}
    for i, targets in following.items():
        for head in targets:
            if dominators[i] >> head & 1:
                body, pending = bodies.setdefault(head, {head}), [i]
                while pending:
                    j = pending.pop()
                    if j not in body:
                        body.add(j)
                        pending += preceding[j]
    return list(bodies.values())


def comes_back(code, call):
    """Whether the code that a CALL goes to has a RET. On sm_80 some loops are left by a CALL that never comes back."""
    labels = re.findall(r"\.L\w+|\$\w+", call.operands)
    pending, seen = [code.labels[label] for label in labels if label in code.labels], set()
    if not pending:
        return True  # nothing is known of it
    while pending:
        i = pending.pop()
        if i in seen:
            continue
        seen.add(i)
        if kind(code.instructions[i]) == "RET":
            return True
        pending += successors(code, i)
    return False


def judge(code):
    """(instructions an HMMA in the main loop that has the most, what is wrong) of a kernel; (None, []) without HMMA."""
    def those(body, *kinds):
        return [code.instructions[i] for i in sorted(body) if kind(code.instructions[i]) in kinds]

    everything = range(len(code.instructions))
    if not those(everything, "HMMA"):
        return None, []
    flaws = []
    if local := those(everything, "LDL", "STL"):
        flaws.append(f"{len(local)} accesses to local memory, the first by {local[0].opcode}")
    products = [body for body in loops(code) if those(body, "HMMA")]
    if not products:
        flaws.append("HMMA stands in no loop")
    main_loops = []
    for innermost in (body for body in products if not any(other < body for other in products)):
        around = [body for body in products if body >= innermost and those(body, "LDGSTS")]
        if not around:
            flaws.append("a loop with HMMA has no LDGSTS, and no loop around it has")
        main_loops.append(min(around, key=len, default=innermost))

    most = 0.
    for body in main_loops:
        count = len(those(body, "HMMA"))
        ratio = math.ceil(100 * len(body) / count) / 100
        most = max(most, ratio)
        flaws += [f"the main loop calls {i.operands}" for i in those(body, "CALL") if comes_back(code, i)][:1]
        for i in (code.instructions[i] for i in sorted(body)):
            if any(opcode.match(i.opcode) and operands.search(i.operands) for opcode, operands in CONVERSIONS):
                flaws.append(f"the main loop converts to tf32: {i.opcode} {i.operands}")
                break
    return most, list(dict.fromkeys(flaws))
