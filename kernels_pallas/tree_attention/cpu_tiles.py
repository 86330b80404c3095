"""The tiles of tree attention on a CPU as LLVM's intermediate representation: products of a few query rows with a block
of keys, and of their weights with its values. Rows stay in registers while a loop runs over the block."""

KEYS = 64  # of a block
_AHEAD = 64  # keys between the announcement of a read and the read
_LINE = 64  # bytes of a cache line


def scores(rows: int, dim: int, lanes: int) -> str:
    """The function `scores.ROWS`: query [rows, dim], key [count, dim] -> their products p [rows, KEYS]."""
    vector, parts = f"<{lanes} x float>", range(0, dim, lanes)
    lines = [
        f"define internal void @scores.{rows}(ptr noalias %q, ptr noalias %key, ptr noalias %p, i64 %count) {{",
        "entry:",
        *(
            line
            for r in range(rows)
            for j in parts
            for line in (
                f"  %q.{r}.{j}.at = getelementptr float, ptr %q, i64 {r * dim + j}",
                f"  %q.{r}.{j} = load {vector}, ptr %q.{r}.{j}.at, align 4",
            )
        ),
        "  br label %loop",
        "loop:",
        "  %s = phi i64 [ 0, %entry ], [ %s.next, %loop ]",
        f"  %first = mul i64 %s, {dim}",
        "  %k = getelementptr float, ptr %key, i64 %first",
        *_announce("%k", dim),
    ]
    for j in parts:
        lines += [
            f"  %k.{j}.at = getelementptr float, ptr %k, i64 {j}",
            f"  %k.{j} = load {vector}, ptr %k.{j}.at, align 4",
        ]
        for r in range(rows):
            before = f"%sum.{r}.{j - lanes}" if j else "zeroinitializer"
            lines.append(
                f"  %sum.{r}.{j} = call {vector} @llvm.fma.v{lanes}f32({vector} %q.{r}.{j}, {vector} %k.{j}, "
                f"{vector} {before})"
            )
    for r in range(rows):
        lines += [
            f"  %dot.{r} = call reassoc float @llvm.vector.reduce.fadd.v{lanes}f32(float 0.0, "
            f"{vector} %sum.{r}.{parts[-1]})",
            f"  %p.{r}.at = add i64 %s, {r * KEYS}",
            f"  %p.{r} = getelementptr float, ptr %p, i64 %p.{r}.at",
            f"  store float %dot.{r}, ptr %p.{r}",
        ]
    return "\n".join([*lines, *_END_OF_LOOP])


def mix(rows: int, dim: int, lanes: int) -> str:
    """The function `mix.ROWS`: sum [rows, dim] += p [rows, count] times value [count, dim]."""
    vector, places = f"<{lanes} x float>", [(r, j) for r in range(rows) for j in range(0, dim, lanes)]
    lines = [
        f"define internal void @mix.{rows}(ptr noalias %sum, ptr noalias %value, ptr noalias %p, i64 %count) {{",
        "entry:",
    ]
    for r, j in places:
        lines += [
            f"  %at.{r}.{j} = getelementptr float, ptr %sum, i64 {r * dim + j}",
            f"  %old.{r}.{j} = load {vector}, ptr %at.{r}.{j}, align 4",
        ]
    lines += [
        "  br label %loop",
        "loop:",
        "  %s = phi i64 [ 0, %entry ], [ %s.next, %loop ]",
        *(
            f"  %sum.{r}.{j} = phi {vector} [ %old.{r}.{j}, %entry ], [ %new.{r}.{j}, %loop ]"
            for r, j in places
        ),
        f"  %first = mul i64 %s, {dim}",
        "  %v = getelementptr float, ptr %value, i64 %first",
        *_announce("%v", dim),
    ]
    for j in range(0, dim, lanes):
        lines += [
            f"  %v.{j}.at = getelementptr float, ptr %v, i64 {j}",
            f"  %v.{j} = load {vector}, ptr %v.{j}.at, align 4",
        ]
    for r in range(rows):
        lines += [
            f"  %p.{r}.at = add i64 %s, {r * KEYS}",
            f"  %p.{r}.ptr = getelementptr float, ptr %p, i64 %p.{r}.at",
            f"  %p.{r} = load float, ptr %p.{r}.ptr",
            f"  %p.{r}.1 = insertelement {vector} poison, float %p.{r}, i32 0",
            f"  %p.{r}.all = shufflevector {vector} %p.{r}.1, {vector} poison, <{lanes} x i32> zeroinitializer",
        ]
    for r, j in places:
        lines.append(
            f"  %new.{r}.{j} = call {vector} @llvm.fma.v{lanes}f32({vector} %p.{r}.all, {vector} %v.{j}, "
            f"{vector} %sum.{r}.{j})"
        )
    stores = (f"  store {vector} %new.{r}.{j}, ptr %at.{r}.{j}, align 4" for r, j in places)
    return "\n".join([*lines, *_END_OF_LOOP[:-2], *stores, *_END_OF_LOOP[-2:]])


_END_OF_LOOP = (
    "  %s.next = add i64 %s, 1",
    "  %more = icmp ult i64 %s.next, %count",
    "  br i1 %more, label %loop, label %end",
    "end:",
    "  ret void",
    "}",
)


def _announce(row: str, dim: int) -> list[str]:
    """Lines that ask for the row of `dim` floats that is `_AHEAD` rows behind this one."""
    lines = []
    for offset in range(0, 4 * dim, _LINE):
        name = f"%ahead.{offset}"
        lines += [
            f"  {name} = getelementptr i8, ptr {row}, i64 {4 * dim * _AHEAD + offset}",
            f"  call void @llvm.prefetch.p0(ptr {name}, i32 0, i32 3, i32 1)",
        ]
    return lines
