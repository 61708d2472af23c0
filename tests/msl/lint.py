"""Refuses what clang would let pass on the host but a Mac would not, and what the simulator cannot see.

The rules hold for the text that is shipped: includes pasted in, nothing but <metal_*> left to include. Stricter than
Metal where that is simpler: some of what is refused here has a form that newer versions of Metal accept.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .scan import blank
from .translate import POSITIONS

SPACES = {"device", "constant", "thread", "threadgroup", "threadgroup_imageblock", "ray_data", "object_data"}
ATTRIBUTES = POSITIONS | {
    *("kernel", "host_name", "buffer", "threadgroup", "function_constant", "max_total_threads_per_threadgroup"),
}
WORDS = {
    **dict.fromkeys(("double", "double2", "double3", "double4"), "Metal has no double"),
    **dict.fromkeys(("new", "delete"), "Metal has no dynamic memory"),
    **dict.fromkeys(("try", "catch", "throw", "noexcept"), "Metal has no exceptions"),
    **dict.fromkeys(("typeid", "dynamic_cast", "virtual"), "Metal has no types at run time"),
    **dict.fromkeys(("goto", "asm", "register", "thread_local", "wchar_t"), "Metal does not have this of C++"),
    **dict.fromkeys(("concept", "requires", "consteval", "constinit", "co_await", "co_yield"), "Metal has no C++20"),
    **dict.fromkeys(("std", "printf", "main"), "Metal has no C++ standard library"),
    **dict.fromkeys(("_Float16", "__bf16", "__int128", "__attribute__"), "this is the host's compiler"),
    **dict.fromkeys(("long3", "long4", "ulong3", "ulong4"), "the simulator does not see vectors of 32 bytes"),
}
QUALIFIERS = {"const", "volatile", "constexpr", "static", "inline", "typename", "unsigned", "signed"}
ELEMENTS = ("bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "half", "bfloat", "float")
TYPES = {
    *("void", "auto", "size_t", "ptrdiff_t", "unsigned", "signed", "vec", "packed_vec", "array", "atomic"),
    *ELEMENTS,
    *(f"{packed}{element}{n}" for packed in ("", "packed_") for element in ELEMENTS for n in (2, 3, 4)),
    *(f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *(f"atomic_{kind}" for kind in ("int", "uint", "float", "ulong", "bool")),
    *("simdgroup_matrix", "simdgroup_float8x8", "simdgroup_half8x8", "simdgroup_bfloat8x8"),
}
TOKEN = re.compile(
    r'^# (?P<line>\d+) "(?P<file>[^"]*)".*$|'
    r'(?P<token>\d[\w.]*(?:(?<=[eEpP])[+-]\w+)?|\w+|"(?:\\.|[^"\\\n])*"|::|&&|->|[^\s#])|'
    r"(?P<pragma>#[^\n]*)|\n",
    re.M,
)


@dataclass(frozen=True)
class Token:
    """A word, a string or a mark of the preprocessed text, and where it stands."""

    text: str
    where: str


def lint(preprocessed: str) -> list[str]:
    """Return what is wrong with a file, each with file and line."""
    tokens = list(tokenize(drop_known_attributes(preprocessed)))
    return [*check_words(tokens), *check_pointers(tokens), *check_statements(tokens)]


def check_characters(source: Path) -> Iterator[str]:
    """ASCII only, and no includes but those that Metal has."""
    for number, line in enumerate(source.read_bytes().splitlines(), 1):
        if not line.isascii():
            yield f"{source.name}:{number}: not ASCII, which Metal takes source for"
        include = re.match(rb"\s*#\s*(?:include|import)\s*(.*)", line)
        if include and not re.match(rb"<metal_\w+>", include[1]):
            yield f"{source.name}:{number}: only <metal_*> can be included where kernels are compiled on a Mac"


def drop_known_attributes(text: str) -> str:
    """Take out [[...]] whose names are known; their strings and words are not code."""

    def drop(m: re.Match[str]) -> str:
        names = re.findall(r"(\w+)\s*(?:\([^()]*\))?", m[1])
        return blank(m[0]) if ATTRIBUTES.issuperset(names) else m[0]

    return re.sub(r"\[\[((?:[^\]]|\](?!\]))*)\]\]", drop, text)


def tokenize(text: str) -> Iterator[Token]:
    file, line = "?", 1
    for m in TOKEN.finditer(text):
        if m["file"] is not None:
            file, line = m["file"].rpartition("/")[2], int(m["line"]) - 1
        elif m[0] == "\n":
            line += 1
        elif m["token"]:
            yield Token(m[0], f"{file}:{line}")


def check_words(tokens: list[Token]) -> Iterator[str]:
    for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], None], strict=False):
        text = token.text
        if text in WORDS and not (text == "std" and after and after.text != "::"):
            yield f"{token.where}: {text}: {WORDS[text]}"
        elif text == "long" and after and after.text in ("long", "double"):
            yield f"{token.where}: long {after.text}: Metal does not have this type"
        elif re.match(r"msl_|MSL_|__builtin_|__metal_", text):
            yield f"{token.where}: {text}: not a name for kernels to use"
        elif text.startswith('"'):
            yield f"{token.where}: a string"
        elif text == "[" and before and before.text in ("=", "(", ",", "return", "{", ";", "["):
            yield f"{token.where}: a lambda, or an attribute that the simulator does not know"
        elif re.fullmatch(r"(?:0[xX][\da-fA-F.]+[pP]|\d)[\w.]*[lL]", text) and re.search(r"\.|[eEpP]\d", text):
            yield f"{token.where}: {text}: Metal has no long double"
    for i, token in enumerate(tokens):
        words = [t.text for t in tokens[i : i + 6]]
        if words[:2] == ["vec", "<"] and words[2] in ("long", "ulong") and words[3:5] in ([",", "3"], [",", "4"]):
            yield f"{token.where}: the simulator does not see vectors of 32 bytes"


def check_pointers(tokens: list[Token]) -> Iterator[str]:
    """Every pointer and reference names the address space of what it points to."""
    words = [t.text for t in tokens]
    types = declared_types(words)
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token.text == "(") - (token.text == ")")
        mark = i if token.text in ("*", "&", "&&") else None
        if mark and words[i - 1] == "(" and words[i + 2 : i + 4] == [")", "["]:  # T (&name)[n]
            mark = i - 1
        if token.text == "[" and depth:  # T name[n] as a parameter
            end = words.index("]", i) + 1
            mark = i - 1 if words[end] in (",", ")") else None
        if mark and lacks_address_space(words, mark, types):
            yield f"{token.where}: a pointer or reference without an address space"


def declared_types(words: list[str]) -> set[str]:
    """Names that stand for types: Metal's own, structs, aliases, template parameters."""
    types = set(TYPES)
    for i, word in enumerate(words[:-2]):
        if word in ("struct", "class", "union", "enum", "typename") or (word == "using" and words[i + 2] == "="):
            types.add(words[i + 1])
        elif word == "typedef":
            types.add(words[words.index(";", i) - 1])
    return types


def lacks_address_space(words: list[str], mark: int, types: set[str]) -> bool:
    """Say whether the `*` or `&` at `mark` belongs to a type, and none of the words before it names a space."""
    at = mark - 1
    while words[at] in ("const", "volatile"):
        at -= 1
    if words[at] in SPACES:
        return False
    if words[at] == "*":  # a pointer to a pointer, or a product with what a pointer points to
        return words[before_arguments(words, at - 1)] in types
    at = before_arguments(words, at)
    if words[at] not in types:
        return False
    while at >= 0 and (words[at] in types | QUALIFIERS | {"::"} or words[at + 1] == "::"):
        at = before_arguments(words, at - 1)
        if words[at] in SPACES:
            return False
    return True


def before_arguments(words: list[str], at: int) -> int:
    """Step over `<...>` backwards, to the name of the template."""
    depth = 0
    while at >= 0:
        depth += (words[at] == ">") - (words[at] == "<")
        at -= depth > 0 or words[at] == "<"
        if depth == 0:
            break
    return at


def check_statements(tokens: list[Token]) -> Iterator[str]:
    """Variables of the program, and static ones, lie in constant memory."""
    scopes: list[str] = []  # of the braces that are open
    statement: list[Token] = []
    for token in tokens:
        if token.text == "{":
            words = without_template([t.text for t in statement])
            scopes.append("value" if assigns(words) else scope_of(words))
            statement = statement if scopes[-1] == "value" else []
        elif token.text == "}":
            if not scopes or scopes.pop() != "value":
                statement = []
        elif token.text == ";":
            yield from check_variable(statement, scopes)
            statement = []
        elif "value" not in scopes:
            statement.append(token)


def scope_of(words: list[str]) -> str:
    return words[0] if words and words[0] in ("namespace", "struct", "class", "union", "enum") else "code"


def assigns(words: list[str]) -> bool:
    """Say whether a `=` stands outside of parentheses."""
    depth = 0
    for word in words:
        depth += (word == "(") - (word == ")")
        if word == "=" and depth == 0:
            return "operator" not in words
    return False


def without_template(words: list[str]) -> list[str]:
    """Drop `template <...>` from the front."""
    while words[:2] == ["template", "<"]:
        depth, end = 1, 2
        while depth and end < len(words):
            depth += (words[end] == "<") - (words[end] == ">")
            end += 1
        words = words[end:]
    return words


def check_variable(statement: list[Token], scopes: list[str]) -> Iterator[str]:
    words = without_template([t.text for t in statement])
    other = {"using", "typedef", "static_assert", "struct", "class", "union", "enum", "template", "friend"}
    of_the_program = set(scopes) <= {"namespace"}
    if len(words) < 2 or words[0] in other or not (of_the_program or words[0] == "static"):
        return
    declarator = words[: words.index("=")] if "=" in words else words
    if "(" not in declarator and "constant" not in declarator:
        yield f"{statement[0].where}: a variable of the program must be in constant memory"


def check_recursion(ir: str) -> Iterator[str]:
    """Functions do not call themselves, be it through others. Read from LLVM's text, which knows what is called."""
    calls: dict[str, set[str]] = {}
    places: dict[str, str] = {}
    metadata = dict(re.findall(r"^(![0-9]+) = (?:distinct )?(!DI(?:Subprogram|File)\(.*\))$", ir, re.M))
    for m in re.finditer(r"^define [^\n]*@([\w.$]+)\([^\n]*?(?:!dbg (![0-9]+) )?\{\n(.*?)^\}", ir, re.M | re.S):
        calls[m[1]] = set(re.findall(r"\bcall\b[^\n]*?@([\w.$]+)\(", m[3]))
        subprogram = metadata.get(m[2] or "", "")
        file = re.search(r"file: (![0-9]+)", subprogram)
        name = re.search(r'filename: "(?:[^"]*/)?([^"]*)"', metadata.get(file[1], "") if file else "")
        line = re.search(r"\bline: (\d+)", subprogram)
        places[m[1]] = f"{name[1] if name else '?'}:{line[1] if line else '?'}"
    for function in calls:
        reached, new = set(), calls[function]
        while new:
            reached |= new
            new = set().union(*(calls.get(f, set()) for f in new)) - reached
        if function in reached:
            yield f"{places[function]}: a function that calls itself"
