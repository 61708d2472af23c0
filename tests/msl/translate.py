"""Turns preprocessed Metal text into C++ that clang compiles for the host behind shim/msl.h, line for line.

Most of the language is C++ and is left alone. What clang does not know on the host is rewritten here, a function each.
"""

import re
from dataclasses import dataclass, field

from .scan import after_bracket, blank, line_at, split_commas

MOST_THREADS = 1024
ATTRIBUTE = r"\[\[(?:[^\]]|\](?!\]))*\]\]"
POSITIONS = {  # attributes that bear a member of msl::Thread (runtime/kernel.h)
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "threads_per_grid",
    "threadgroups_per_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup",
    "threads_per_simdgroup",
    "thread_execution_width",
    "thread_index_in_quadgroup",
    "quadgroup_index_in_threadgroup",
    "quadgroups_per_threadgroup",
}


@dataclass
class Parameter:
    """A kernel's parameter: a buffer with its index (slot device, constant or threadgroup), or a position."""

    name: str
    slot: str
    index: int = -1
    optional: bool = False


@dataclass
class Definition:
    """A kernel function as the text defines it."""

    parameters: list[Parameter]
    defined_at: str
    most_threads: int


@dataclass
class Kernel:
    """A kernel that the host can ask for: a function, or an instantiation of a template."""

    name: str
    function: str
    definition: Definition


@dataclass
class FunctionConstant:
    """A constant that the host sets."""

    index: int
    name: str
    type: str


@dataclass
class Translation:
    """The C++ text and what the host must know of it."""

    code: str
    kernels: list[Kernel] = field(default_factory=list)
    constants: list[FunctionConstant] = field(default_factory=list)


def translate(text: str) -> Translation:
    definitions, kernels = find_kernels(text)
    text, instantiations = take_instantiations(text, definitions)
    text = drop_attributes(text)
    text = initialise_vectors_by_assignment(text)
    text, constants = declare_function_constants(text)
    text = declare_threadgroup_variables(text)
    text = unqualify_methods(text)
    text = array_parameters_to_pointers(text)
    text = construct_template_vectors(text)
    return Translation(text, kernels + instantiations, constants)


def find_kernels(text: str) -> tuple[dict[str, Definition], list[Kernel]]:
    """Find the definitions of kernels, and among them those that are not templates."""
    pattern = rf"(?:\[\[\s*kernel\b(?:[^\]]|\](?!\]))*\]\]|\bkernel\b)\s*(?:{ATTRIBUTE}\s*)*void\s+(\w+)\s*\("
    definitions, kernels = {}, []
    for m in re.finditer(pattern, text):
        end = after_bracket(text, m.end() - 1)
        file, line = line_at(text, m.start(1))
        before = text[: m.start()].rstrip()
        attributes = re.search(rf"(?:{ATTRIBUTE}\s*)*$", before)
        limit = re.search(r"max_total_threads_per_threadgroup\s*\(\s*(\d+)", attributes[0] + m[0])
        definition = Definition(
            parse_parameters(text[m.end() : end - 1]), f"{file}:{line}", int(limit[1]) if limit else MOST_THREADS
        )
        definitions[m[1]] = definition
        if not before[: attributes.start()].rstrip().endswith(">"):
            host_name = re.search(r'host_name\s*\(\s*"([^"]*)"', attributes[0] + m[0])
            kernels.append(Kernel(host_name[1] if host_name else m[1], m[1], definition))
    return definitions, kernels


def parse_parameters(text: str) -> list[Parameter]:
    """Read parameters with their attributes. Buffers without an index take the free ones in order, as in Metal."""
    declarations = split_commas(re.sub(r"^\s*#.*$", "", text, flags=re.M))
    taken = {int(i) for i in re.findall(r"\[\[[^\]]*\bbuffer\s*\(\s*(\d+)\s*\)", text)}
    parameters: list[Parameter] = []
    for declaration in declarations:
        attributes = dict(re.findall(r"(\w+)\s*(?:\(\s*(\w+)\s*\))?", " ".join(re.findall(ATTRIBUTE, declaration))))
        bare = re.sub(ATTRIBUTE, "", declaration)
        name = re.search(r"(\w+)\s*(?:\[[^\]]*\]\s*)?$", bare)[1]
        optional = "function_constant" in attributes
        if position := POSITIONS & attributes.keys():
            parameters.append(Parameter(name, position.pop()))
        elif "threadgroup" in attributes or re.search(r"\bthreadgroup\b", bare):
            index = int(attributes.get("threadgroup") or sum(p.slot == "threadgroup" for p in parameters))
            parameters.append(Parameter(name, "threadgroup", index, optional))
        elif "buffer" in attributes or not attributes.keys() - {"function_constant"}:
            index = int(attributes["buffer"]) if "buffer" in attributes else min(set(range(31)) - taken)
            taken.add(index)
            slot = "constant" if re.search(r"\bconstant\b", bare) else "device"
            parameters.append(Parameter(name, slot, index, optional))
        else:
            raise ValueError(f"a kernel's parameter has an attribute that the simulator does not know: {declaration}")
    return parameters


def take_instantiations(text: str, definitions: dict[str, Definition]) -> tuple[str, list[Kernel]]:
    """Take out explicit instantiations such as `template [[host_name("x")]] kernel decltype(f<T>) f<T>;`."""
    kernels: list[Kernel] = []

    def take(m: re.Match[str]) -> str:
        attributes, body = m[1], m[2]
        declared = re.match(r"\s*(?:kernel\s+)?decltype(?=\()", body)
        if declared:
            function = body[declared.end() + 1 : after_bracket(body, declared.end()) - 1]
        else:
            function = re.match(r"\s*(?:kernel\s+)?void\s+([\w:]+\s*(?:<.*>)?)\s*\(", body, re.S)[1]
        function = re.sub(r"\s+", " ", function).strip()
        host_name = re.search(r'host_name\s*\(\s*((?:"[^"]*"\s*)+)\)', attributes)
        name = "".join(re.findall(r'"([^"]*)"', host_name[1])) if host_name else function
        definition = definitions[re.match(r"[\w:]+", function)[0].split("::")[-1]]
        kernels.append(Kernel(name, function, definition))
        return blank(m[0])

    return re.sub(rf"\btemplate\s*((?:{ATTRIBUTE}\s*)+)([^;]*);", take, text), kernels


def drop_attributes(text: str) -> str:
    """Drop the attributes, which have been read; `threadgroup` in one would be taken for the address space."""
    return re.sub(r"\[\[\s*(?!function_constant)\w+\s*(?:\([^\])]*\))?\s*\]\]", lambda m: blank(m[0]), text)


def initialise_vectors_by_assignment(text: str) -> str:
    """Turn `float2 v(a, b);` into `float2 v = float2(a, b);`: clang's vectors have no constructors."""
    vector = r"(?:char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float)[234]"
    is_a_function = rf"(?!\s*(?:const|device|thread|constant|threadgroup|{vector}|\w+\s+\w+)\b)"
    declaration = rf"([;{{}}]\s*(?:const\s+)?)({vector})(\s+)(\w+)\(({is_a_function}[^;{{}}]*)\);"
    return re.sub(declaration, r"\1\2\3\4 = \2(\5);", text)


def declare_function_constants(text: str) -> tuple[str, list[FunctionConstant]]:
    """Make function constants variables that the host can set."""
    constants = []

    def declare(m: re.Match[str]) -> str:
        constants.append(FunctionConstant(int(m[3]), m[2], m[1].strip()))
        return f'extern "C" {{ MSL_FUNCTION_CONSTANT {m[1].strip()} {m[2]}; }}' + blank(m[0])

    words = r"(?:\b(?:static|constexpr|const)\s+)*"
    attribute = r"\[\[\s*function_constant\s*\(\s*(\d+)\s*\)\s*\]\]"
    return re.sub(rf"{words}\bconstant\s+{words}([\w ]+?)\s+(\w+)\s*{attribute}\s*;", declare, text), constants


def declare_threadgroup_variables(text: str) -> str:
    """Make a kernel's threadgroup variables static, and tell the runtime of them where they are declared."""

    def declare(m: re.Match[str]) -> str:
        space, declaration = m[1], m[2]
        plain = re.sub(r"\[[^\]]*\]", "", declaration)
        while plain != (fewer := re.sub(r"<[^<>]*>", "", plain)):
            plain = fewer
        if re.search(r"[*&(=]", plain):  # a pointer into threadgroup memory, or a function
            return m[0]
        names = [re.search(r"(\w+)\s*$", part)[1] for part in plain.split(",")]
        told = "".join(f" MSL_THREADGROUP_VARIABLE({name})" for name in names)
        return f"{space}MSL_THREADGROUP threadgroup{declaration};{told}"

    return re.sub(r"(?<=[;{}])(\s*(?:\n#[^\n]*\n\s*)*)threadgroup\b([^;]*);", declare, text)


def unqualify_methods(text: str) -> str:
    """Drop the address space of member functions, and of such overloads all but the first, which would be the same."""
    own_memory = re.compile(r"(\)\s*(?:const\s+)?)thread\b(\s*[{:;])")
    qualified = re.compile(r"\)\s*(?:const\s+)?(threadgroup|device|constant)\s*(?=[{:])(?!::)")
    text = own_memory.sub(r"\1\2", text)
    at = 0
    while m := qualified.search(text, at):
        start = declaration_start(text, m.start())
        body = text.index("{", m.end())
        if text[m.end()] == ":":
            body = re.compile(r"[)}]\s*\{").search(text, m.end()).end() - 1
        end = after_bracket(text, body)
        if semicolon := re.compile(r"\s*;").match(text, end):
            end = semicolon.end()
        head = "".join(text[start : m.start(1)].split())
        nearby = "".join((text[max(0, start - 6000) : start] + text[end : end + 6000]).split())
        if head in nearby:
            text = text[:start] + blank(text[start:end]) + text[end:]
            at = start
        else:
            text = text[: m.start(1)] + text[m.end(1) :]
            at = m.start(1)
    return own_memory.sub(r"\1\2", text)


def declaration_start(text: str, at: int) -> int:
    """Go back from the `)` of a parameter list to where its declaration begins."""
    depth = 0
    while not (depth == 0 and text[at] in ";{}"):
        depth += (text[at] == ")") - (text[at] == "(")
        at -= 1
    return at + 1


def array_parameters_to_pointers(text: str) -> str:
    """Turn `threadgroup T v[4]` as a parameter into `threadgroup T* v`, where the address space stays."""
    parameter = r"(?<=[(,])(\s*(?:const\s+)?(?:device|constant|threadgroup)\b[^,();*&{}=]*?)\b(\w+)\s*\[[^\]]*\]"
    return re.sub(parameter + r"(?=\s*[,)])", r"\1* \2", text)


def construct_template_vectors(text: str) -> str:
    """Turn `vec<T, N>(...)` into the function that constructs."""
    vector = r"(?<!operator )(?<!using )((?:metal::)?\bvec<(?:[^<>]|<[^<>]*>)*>)\("
    return re.sub(vector, r"::metal::msl_make<\1>(", text)
