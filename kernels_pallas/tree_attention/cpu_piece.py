"""What a piece of attention on a CPU is made of, as LLVM's intermediate representation: the softmax of a few rows over
blocks of keys, and a key head with all its rows. `tree_attention.cpu` says what is computed."""

from kernels_pallas.cpu_math import constant, exponential, number
from kernels_pallas.tree_attention.common import NEGATIVE
from kernels_pallas.tree_attention.cpu_tiles import KEYS, mix, scores

ROWS = 64  # whose sums are kept at once: more rows read keys and values again
_SUMS = 16  # registers for the sums of a tile

_SOFTMAX = """
declare float @llvm.vector.reduce.fadd.{type}(float, {vector})
declare float @llvm.vector.reduce.fmax.{type}({vector})
declare float @llvm.maxnum.f32(float, float)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

{exponential}

{tiles}

; A row of raw products p [{keys}], of which `count` are there, becomes weights; top, total and sum [{dim}] are moved to
; the new maximum. mask: a byte a key, or null. cap: of the scores, or 0.
define internal void @soften(ptr %p, i64 %count, ptr %mask, float %scale, float %cap, ptr %top, ptr %total,
                             ptr %sum{keep_row}) {{
entry:
  %bytes = alloca [{keys} x i8], align 64
  %masked = icmp ne ptr %mask, null
  br i1 %masked, label %copy, label %begin
copy:
  call void @llvm.memcpy.p0.p0.i64(ptr %bytes, ptr %mask, i64 %count, i1 false)
  br label %begin
begin:
  %capped = fcmp ogt float %cap, 0.0
  %top.old = load float, ptr %top
  %scale.1 = insertelement {vector} poison, float %scale, i32 0
  %scales = shufflevector {vector} %scale.1, {vector} poison, {zeros}
  %cap.1 = insertelement {vector} poison, float %cap, i32 0
  %caps = shufflevector {vector} %cap.1, {vector} poison, {zeros}
  %count.1 = insertelement <{lanes} x i64> poison, i64 %count, i32 0
  %counts = shufflevector <{lanes} x i64> %count.1, <{lanes} x i64> poison, {zeros}
  br label %score
score:
  %c = phi i64 [ 0, %begin ], [ %c.next, %scored ]
  %best = phi {vector} [ {negative}, %begin ], [ %best.next, %scored ]
  %at = getelementptr float, ptr %p, i64 %c
  %raw = load {vector}, ptr %at, align 4
  %x.plain = fmul {vector} %raw, %scales
  br i1 %capped, label %cap.it, label %see
cap.it:  ; cap tanh(x / cap) = cap (1 - 2 / (exp(2 x / cap) + 1))
  %ratio = fdiv {vector} %x.plain, %caps
  %twice = fadd {vector} %ratio, %ratio
  %e = call {vector} @exp({vector} %twice)
  %e.1 = fadd {vector} %e, {one}
  %part = fdiv {vector} {two}, %e.1
  %tanh = fsub {vector} {one}, %part
  %x.capped = fmul {vector} %tanh, %caps
  br label %see
see:
  %x = phi {vector} [ %x.plain, %score ], [ %x.capped, %cap.it ]
  %c.1 = insertelement <{lanes} x i64> poison, i64 %c, i32 0
  %c.all = shufflevector <{lanes} x i64> %c.1, <{lanes} x i64> poison, {zeros}
  %places = add <{lanes} x i64> %c.all, {iota}
  %there = icmp ult <{lanes} x i64> %places, %counts
  br i1 %masked, label %bytes.read, label %scored
bytes.read:
  %byte.at = getelementptr i8, ptr %bytes, i64 %c
  %byte = load <{lanes} x i8>, ptr %byte.at, align 1
  %set = icmp ne <{lanes} x i8> %byte, zeroinitializer
  %both = and {bools} %there, %set
  br label %scored
scored:
  %visible = phi {bools} [ %there, %see ], [ %both, %bytes.read ]
  %x.seen = select {bools} %visible, {vector} %x, {vector} {negative}
  store {vector} %x.seen, ptr %at, align 4
{keep_scores}  %best.next = call {vector} @llvm.maxnum.{type}({vector} %best, {vector} %x.seen)
  %c.next = add i64 %c, {lanes}
  %c.more = icmp ult i64 %c.next, %count
  br i1 %c.more, label %score, label %tops
tops:
  %best.one = call nnan float @llvm.vector.reduce.fmax.{type}({vector} %best.next)
  %top.new = call float @llvm.maxnum.f32(float %top.old, float %best.one)
  store float %top.new, ptr %top
  %top.1 = insertelement {vector} poison, float %top.new, i32 0
  %tops.new = shufflevector {vector} %top.1, {vector} poison, {zeros}
  br label %weigh
weigh:
  %w = phi i64 [ 0, %tops ], [ %w.next, %weigh ]
  %sums = phi {vector} [ zeroinitializer, %tops ], [ %sums.next, %weigh ]
  %w.at = getelementptr float, ptr %p, i64 %w
  %w.x = load {vector}, ptr %w.at, align 4
  %w.less = fsub {vector} %w.x, %tops.new
  %w.e = call {vector} @exp({vector} %w.less)
  store {vector} %w.e, ptr %w.at, align 4
  %sums.next = fadd {vector} %sums, %w.e
  %w.next = add i64 %w, {lanes}
  %w.more = icmp ult i64 %w.next, %count
  br i1 %w.more, label %weigh, label %moved
moved:
  %block = call reassoc float @llvm.vector.reduce.fadd.{type}(float 0.0, {vector} %sums.next)
  %old.1 = insertelement {vector} poison, float %top.old, i32 0
  %old.all = shufflevector {vector} %old.1, {vector} poison, {zeros}
  %old.less = fsub {vector} %old.all, %tops.new
  %old = call {vector} @exp({vector} %old.less)
  %old.one = extractelement {vector} %old, i32 0
  %total.old = load float, ptr %total
  %total.less = fmul float %total.old, %old.one
  %total.new = fadd float %total.less, %block
  store float %total.new, ptr %total
  %same = fcmp oeq float %old.one, 1.0
  br i1 %same, label %end, label %scale.sum
scale.sum:
  %j = phi i64 [ 0, %moved ], [ %j.next, %scale.sum ]
  %j.at = getelementptr float, ptr %sum, i64 %j
  %j.old = load {vector}, ptr %j.at, align 4
  %j.new = fmul {vector} %j.old, %old
  store {vector} %j.new, ptr %j.at, align 4
  %j.next = add i64 %j, {lanes}
  %j.more = icmp ult i64 %j.next, {dim}
  br i1 %j.more, label %scale.sum, label %end
end:
  ret void
}}

; Rows row.. of a piece, `rows` of them, over `count` keys. mask: bytes [1 or G, N, width] of the piece's heads, or
; null; heads: N where the heads have masks of their own, else 0.
define internal void @over(ptr %query, ptr %sum, ptr %top, ptr %total, i64 %row, i64 %rows, ptr %key, ptr %value,
                           i64 %count, ptr %mask, i64 %n, i64 %heads, i64 %width, float %scale,
                           float %cap{keep_rows}) {{
entry:
  %p = alloca [{weights} x float], align 64
  %some = icmp ne i64 %count, 0
  br i1 %some, label %block, label %end
block:
  %s = phi i64 [ 0, %entry ], [ %s.next, %block.end ]
  %left = sub i64 %count, %s
  %here = call i64 @llvm.smin.i64(i64 %left, i64 {keys})
  %s.dim = mul i64 %s, {dim}
  %k = getelementptr float, ptr %key, i64 %s.dim
  %v = getelementptr float, ptr %value, i64 %s.dim
  br label %tile
tile:
  %r = phi i64 [ 0, %block ], [ %r.next, %mixed ]
  %r.left = sub i64 %rows, %r
  %height = call i64 @llvm.smin.i64(i64 %r.left, i64 {height})
  %r.dim = mul i64 %r, {dim}
  %q = getelementptr float, ptr %query, i64 %r.dim
  %sum.r = getelementptr float, ptr %sum, i64 %r.dim
  switch i64 %height, label %score.{height} [ {score_cases} ]
{score_calls}
soften:
  %i = phi i64 [ 0, %scored ], [ %i.next, %softened ]
  %r.i = add i64 %r, %i
  %absolute = add i64 %row, %r.i
  %g = udiv i64 %absolute, %n
  %token = urem i64 %absolute, %n
  %g.row = mul i64 %g, %heads
  %mask.row = add i64 %g.row, %token
  %mask.first = mul i64 %mask.row, %width
  %mask.at = add i64 %mask.first, %s
  %masked = icmp ne ptr %mask, null
  %mask.ptr = getelementptr i8, ptr %mask, i64 %mask.at
  %mask.here = select i1 %masked, ptr %mask.ptr, ptr null
  %p.first = mul i64 %i, {keys}
  %p.i = getelementptr float, ptr %p, i64 %p.first
  %top.i = getelementptr float, ptr %top, i64 %r.i
  %total.i = getelementptr float, ptr %total, i64 %r.i
  %i.dim = mul i64 %i, {dim}
  %sum.i = getelementptr float, ptr %sum.r, i64 %i.dim
{keep_place}  call void @soften(ptr %p.i, i64 %here, ptr %mask.here, float %scale, float %cap, ptr %top.i,
                    ptr %total.i, ptr %sum.i{keep_row_here})
  br label %softened
softened:
  %i.next = add i64 %i, 1
  %i.more = icmp ult i64 %i.next, %height
  br i1 %i.more, label %soften, label %mix
scored:
  br label %soften
mix:
  switch i64 %height, label %mix.{height} [ {mix_cases} ]
{mix_calls}
mixed:
  %r.next = add i64 %r, {height}
  %r.more = icmp ult i64 %r.next, %rows
  br i1 %r.more, label %tile, label %block.end
block.end:
  %s.next = add i64 %s, {keys}
  %s.more = icmp ult i64 %s.next, %count
  br i1 %s.more, label %block, label %end
end:
  ret void
}}
"""

_HEAD = """
; Operand 6 of a job is XLA's call. A piece is a key head of a row of the batch.
define internal void @head(ptr %job, i64 %index) {{
entry:
  %sum = alloca [{sums} x float], align 64
  %top = alloca [{group} x float], align 64
  %total = alloca [{group} x float], align 64
  %frame.at = getelementptr %job, ptr %job, i64 0, i32 6
  %frame = load ptr, ptr %frame.at
{operands}
  %heads = call i64 @dim(ptr %query, i64 1)
  %n = call i64 @dim(ptr %query, i64 2)
  %kv = call i64 @dim(ptr %key, i64 1)
  %slots = call i64 @dim(ptr %key, i64 2)
  %batch.row = udiv i64 %index, %kv
  %kv.head = urem i64 %index, %kv
  %groups = udiv i64 %heads, %kv
  %rows = mul i64 %groups, %n
  %q.first = mul i64 %index, %rows
  %q.dim = mul i64 %q.first, {dim}
  %q = getelementptr float, ptr %query.data, i64 %q.dim
  %o = getelementptr float, ptr %out.data, i64 %q.dim
  %k.first = mul i64 %index, %slots
  %k.dim = mul i64 %k.first, {dim}
  %k = getelementptr float, ptr %key.data, i64 %k.dim
  %v = getelementptr float, ptr %value.data, i64 %k.dim
  %f.first = mul i64 %index, %n
  %f.dim = mul i64 %f.first, {dim}
  %fk = getelementptr float, ptr %fresh_key.data, i64 %f.dim
  %fv = getelementptr float, ptr %fresh_value.data, i64 %f.dim
  %length.at = getelementptr i32, ptr %length.data, i64 %batch.row
  %length.32 = load i32, ptr %length.at
  %length.raw = sext i32 %length.32 to i64
  %held = call i64 @llvm.smin.i64(i64 %length.raw, i64 %slots)
  %scale = load float, ptr %numbers.data
  %cap.at = getelementptr float, ptr %numbers.data, i64 1
  %cap = load float, ptr %cap.at
{masks}
{find_kept}  %head.first = mul i64 %kv.head, %groups
  br label %group
group:
  %row = phi i64 [ 0, %entry ], [ %row.next, %written ]
  %row.left = sub i64 %rows, %row
  %here = call i64 @llvm.smin.i64(i64 %row.left, i64 {group})
  br label %clear
clear:
  %c = phi i64 [ 0, %group ], [ %c.next, %cleared ]
  %top.c = getelementptr float, ptr %top, i64 %c
  store float {lowest_score}, ptr %top.c
  %total.c = getelementptr float, ptr %total, i64 %c
  store float 0.0, ptr %total.c
  %c.dim = mul i64 %c, {dim}
  br label %clear.sum
clear.sum:
  %z = phi i64 [ 0, %clear ], [ %z.next, %clear.sum ]
  %z.place = add i64 %c.dim, %z
  %z.at = getelementptr float, ptr %sum, i64 %z.place
  store {vector} zeroinitializer, ptr %z.at, align 4
  %z.next = add i64 %z, {lanes}
  %z.more = icmp ult i64 %z.next, {dim}
  br i1 %z.more, label %clear.sum, label %cleared
cleared:
  %c.next = add i64 %c, 1
  %c.more = icmp ult i64 %c.next, %here
  br i1 %c.more, label %clear, label %attend
attend:
  %row.dim = mul i64 %row, {dim}
  %q.row = getelementptr float, ptr %q, i64 %row.dim
  %o.row = getelementptr float, ptr %o, i64 %row.dim
  call void @over(ptr %q.row, ptr %sum, ptr %top, ptr %total, i64 %row, i64 %here, ptr %k, ptr %v, i64 %held,
                  ptr %cached_mask.here, i64 %n, i64 %cached_mask.heads, i64 %slots, float %scale,
                  float %cap{keep_cached})
  call void @over(ptr %q.row, ptr %sum, ptr %top, ptr %total, i64 %row, i64 %here, ptr %fk, ptr %fv, i64 %n,
                  ptr %tree.here, i64 %n, i64 %tree.heads, i64 %n, float %scale, float %cap{keep_fresh})
  br label %write
write:
  %w = phi i64 [ 0, %attend ], [ %w.next, %wrote ]
  %w.total.at = getelementptr float, ptr %total, i64 %w
  %w.total = load float, ptr %w.total.at
  %w.1 = insertelement {vector} poison, float %w.total, i32 0
  %w.all = shufflevector {vector} %w.1, {vector} poison, {zeros}
  %w.dim = mul i64 %w, {dim}
  br label %write.sum
write.sum:
  %y = phi i64 [ 0, %write ], [ %y.next, %write.sum ]
  %y.place = add i64 %w.dim, %y
  %y.from = getelementptr float, ptr %sum, i64 %y.place
  %y.sum = load {vector}, ptr %y.from, align 4
  %y.out = fdiv {vector} %y.sum, %w.all
  %y.to = getelementptr float, ptr %o.row, i64 %y.place
  store {vector} %y.out, ptr %y.to, align 4
  %y.next = add i64 %y, {lanes}
  %y.more = icmp ult i64 %y.next, {dim}
  br i1 %y.more, label %write.sum, label %wrote
wrote:
  %w.next = add i64 %w, 1
  %w.more = icmp ult i64 %w.next, %here
  br i1 %w.more, label %write, label %written
written:
  %row.next = add i64 %row, {group}
  %more = icmp ult i64 %row.next, %rows
  br i1 %more, label %group, label %end
end:
{finish}  ret void
}}
"""

_OPERANDS = ("query", "key", "value", "fresh_key", "fresh_value", "length", "tree", "cached_mask", "numbers")

# Where the scores are kept.
_KEEP = dict(
    keep_row=", ptr %kept",
    keep_scores="""\
  %kept.at = getelementptr float, ptr %kept, i64 %c
  store {vector} %x.seen, ptr %kept.at, align 4
""",
    keep_rows=", ptr %kept, i64 %kept.width",
    keep_place="""\
  %kept.first = mul i64 %absolute, %kept.width
  %kept.place = add i64 %kept.first, %s
  %kept.i = getelementptr float, ptr %kept, i64 %kept.place
""",
    keep_row_here=", ptr %kept.i",
    find_kept="""\
  %kept = call ptr @buffer(ptr %frame, i64 -2)
  %kept.data = call ptr @data(ptr %kept)
  %kept.width = call i64 @dim(ptr %kept, i64 2)
  %kept.line = mul i64 %q.first, %kept.width
  %kept.here = getelementptr float, ptr %kept.data, i64 %kept.line
  %held.up = add i64 %held, {last_lane}
  %held.part = urem i64 %held.up, {lanes}
  %turn = sub i64 %held.up, %held.part
  %kept.fresh = getelementptr float, ptr %kept.here, i64 %turn
""",
    keep_cached=", ptr %kept.here, i64 %kept.width",
    keep_fresh=", ptr %kept.fresh, i64 %kept.width",
    finish="  call void @finish.kept(ptr %frame, i64 %index, ptr %kept.here, i64 %kept.width, i64 %turn)\n",
)


def softmax(dim: int, lanes: int, keep: bool = False) -> str:
    """The function `@over`: a few rows over the keys and values of an array; see its head.

    keep: it also writes the masked scores: of row r to kept[r, s] for key s, NEGATIVE up to the next whole vector.
    """
    height = max(1, min(8, _SUMS // (dim // lanes)))
    numbers = range(1, height + 1)
    vector = f"<{lanes} x float>"

    def calls(name: str, function: str, arguments: str, after: str) -> str:
        return "\n".join(
            f"{name}.{n}:\n  call void @{function}.{n}({arguments})\n  br label %{after}" for n in numbers
        )

    return _SOFTMAX.format(
        vector=vector,
        type=f"v{lanes}f32",
        lanes=lanes,
        bools=f"<{lanes} x i1>",
        zeros=f"<{lanes} x i32> zeroinitializer",
        iota="<" + ", ".join(f"i64 {i}" for i in range(lanes)) + ">",
        one=constant(1),
        two=constant(2),
        negative=constant(NEGATIVE),
        exponential=exponential(lanes),
        tiles="\n\n".join(make(n, dim, lanes) for make in (scores, mix) for n in numbers),
        keys=KEYS,
        dim=dim,
        height=height,
        weights=height * KEYS,
        score_cases=" ".join(f"i64 {n}, label %score.{n}" for n in numbers),
        score_calls=calls("score", "scores", "ptr %q, ptr %k, ptr %p, i64 %here", "scored"),
        mix_cases=" ".join(f"i64 {n}, label %mix.{n}" for n in numbers),
        mix_calls=calls("mix", "mix", "ptr %sum.r, ptr %v, ptr %p, i64 %here", "mixed"),
        **_kept(keep, vector, lanes),
    )


def head(dim: int, lanes: int, keep: bool = False) -> str:
    """The function of a piece, `@head(job, index)`; needs `softmax` beside it, of the same `keep`.

    keep: the second result, [B, H N, width], gets the scores of every row: those of the held slots, and from the next
    whole vector on (`turn`) those of the new tokens. At the end of a piece this function is called, for its rows:

        @finish.kept(ptr %frame, i64 %index, ptr %kept, i64 %width, i64 %turn)
    """
    operands = [
        line
        for index, name in [*enumerate(_OPERANDS), (-1, "out")]
        for line in (
            f"  %{name} = call ptr @buffer(ptr %frame, i64 {index})",
            f"  %{name}.data = call ptr @data(ptr %{name})",
        )
    ]
    vector = f"<{lanes} x float>"
    return _HEAD.format(
        vector=vector,
        lanes=lanes,
        zeros=f"<{lanes} x i32> zeroinitializer",
        lowest_score=number(NEGATIVE),
        dim=dim,
        group=ROWS,
        sums=ROWS * dim,
        operands="\n".join(operands),
        masks=_mask("cached_mask", "%slots") + "\n" + _mask("tree", "%n"),
        **_kept(keep, vector, lanes),
    )


def _kept(keep: bool, vector: str, lanes: int) -> dict[str, str]:
    if not keep:
        return dict.fromkeys(_KEEP, "")
    return {
        name: text.format(vector=vector, lanes=lanes, last_lane=lanes - 1) for name, text in _KEEP.items()
    }


def _mask(name: str, width: str) -> str:
    """Lines that find `%NAME.here`, the mask of a piece or null where its first dimension is 0, and `%NAME.heads`."""
    return f"""
  %{name}.batch = call i64 @dim(ptr %{name}, i64 0)
  %{name}.many = call i64 @dim(ptr %{name}, i64 1)
  %{name}.none = icmp eq i64 %{name}.batch, 0
  %{name}.whole = icmp ugt i64 %{name}.batch, 1
  %{name}.own = icmp ugt i64 %{name}.many, 1
  %{name}.row = select i1 %{name}.whole, i64 %batch.row, i64 0
  %{name}.rows = mul i64 %{name}.row, %{name}.many
  %{name}.kv = mul i64 %kv.head, %groups
  %{name}.head = select i1 %{name}.own, i64 %{name}.kv, i64 0
  %{name}.plane = add i64 %{name}.rows, %{name}.head
  %{name}.line = mul i64 %{name}.plane, %n
  %{name}.first = mul i64 %{name}.line, {width}
  %{name}.ptr = getelementptr i8, ptr %{name}.data, i64 %{name}.first
  %{name}.here = select i1 %{name}.none, ptr null, ptr %{name}.ptr
  %{name}.heads = select i1 %{name}.own, i64 %n, i64 0"""
