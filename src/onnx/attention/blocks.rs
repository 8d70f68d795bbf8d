//! Attention by `MultiHeadAttention`, some queries at a time.
//!
//! The operator adds what a query may see as it multiplies and leaves tokens where they are, but it computes every
//! score and keeps all of them: for thousands of tokens neither fits a cache, and a half is thrown away. So a
//! `Loop` hands it a block of queries at a time, with the keys up to the last of them. Blocks are as many as
//! needed and as equal as possible; the last one repeats the last query where rows lack, and these are cut off.

use super::Context;
use super::attend::Queries;
use super::core::Cache;
use crate::onnx::builder::{Builder, Name};
use crate::onnx::graph::{Attribute, Dim};

/// Most queries of a block.
const QUERIES: i64 = 256;

/// How the rows of queries are divided, scalars.
struct Blocks {
    /// How many rows there are.
    rows: Name,
    /// How many blocks.
    count: Name,
    /// How many rows each has.
    size: Name,
    /// The number of the last row.
    last: Name,
}

impl Context<'_> {
    /// The context of `queries`, of their shape, called `output`. `numbers` are those of their tokens.
    pub(super) fn in_blocks(
        &self,
        b: &mut Builder,
        place: &str,
        queries: &Queries<'_>,
        numbers: &str,
        cache: &Cache,
        output: &str,
    ) -> Name {
        let q = self.rotate(b, &format!("{place}.q.rotated"), queries.projected(), numbers);
        // Of one sequence, a token's number is its column.
        let columns = match queries {
            Queries::All(_) => None,
            Queries::Kept(..) => {
                let flat = b.ints("shapes.flat", &[-1]);
                Some(b.op(&format!("{place}.columns"), "Reshape", &[numbers, &flat]))
            }
        };
        let blocks = blocks(b, place, columns.as_deref());
        let name = |part: &str| format!("{place}.{part}");
        let width = Dim::Fixed(self.query_width());
        let shape = [b.batch(), Dim::Open, width];
        let stacked = b.stacked(&name("blocks"), &blocks.count, shape, |b, number| {
            self.block(b, place, (&q, columns.as_deref()), &blocks, number, cache)
        });
        let (batch_first, width) = (vec![1, 0, 2, 3], self.query_width() as i64);
        let sorted = vec![("perm", Attribute::Ints(batch_first))];
        let sorted = b.op_with(&name("blocks.sorted"), "Transpose", &[&stacked], sorted);
        let joined = b.ints("shapes.joined_blocks", &[0, -1, width]);
        let joined = b.op(&name("blocks.joined"), "Reshape", &[&sorted, &joined]);
        let (zero, along) = (b.ints("constants.0", &[0]), b.ints("constants.sequence_axis", &[1]));
        let flat = b.ints("shapes.flat", &[-1]);
        let rows = b.op(&name("rows.vector"), "Reshape", &[&blocks.rows, &flat]);
        b.op(output, "Slice", &[&joined, &zero, &rows, &along])
    }

    /// The context of block `number`, `[batch, size, heads · head_dim]`.
    fn block(
        &self,
        b: &mut Builder,
        place: &str,
        (q, columns): (&str, Option<&str>),
        Blocks { size, last, .. }: &Blocks,
        number: &str,
        cache: &Cache,
    ) -> Name {
        let name = |part: &str| format!("{place}.block.{part}");
        let one = b.int("constants.one", 1);
        let from = b.op(&name("from"), "Mul", &[number, size]);
        let to = b.op(&name("to"), "Add", &[&from, size]);
        let rows = b.op(&name("range"), "Range", &[&from, &to, &one]);
        let rows = b.op(&name("rows"), "Min", &[&rows, last]);
        let columns = match columns {
            None => rows.clone(),
            Some(columns) => b.op(&name("columns"), "Gather", &[columns, &rows]),
        };
        let q = b.op_with(&name("q"), "Gather", &[q, &rows], vec![("axis", Attribute::Int(1))]);

        // Columns rise.
        let final_one = b.ints("constants.last", &[-1]);
        let end = b.op(&name("last"), "Gather", &[&columns, &final_one]);
        let end = b.op(&name("last.key"), "Add", &[&end, "mask.past"]);
        let end = b.op(&name("end"), "Add", &[&end, &one]);
        let zero = b.ints("constants.0", &[0]);
        let [k, v] = [("keys", &cache.keys), ("values", &cache.values)].map(|(part, x)| {
            let along = b.ints("constants.cache_axis", &[2]);
            let x = b.op(&name(part), "Slice", &[x, &zero, &end, &along]);
            self.for_every_head(b, &name(part), &x)
        });
        let of_rows = vec![("axis", Attribute::Int(2))];
        let bias = [self.shared.bias.as_str(), &columns];
        let bias = b.op_with(&name("bias.rows"), "Gather", &bias, of_rows);
        let along = b.ints("constants.key_axis", &[3]);
        let bias = b.op(&name("bias"), "Slice", &[&bias, &zero, &end, &along]);
        let heads = vec![("num_heads", Attribute::Int(self.config.num_attention_heads as i64))];
        let inputs = [q.as_str(), &k, &v, "", "", &bias];
        b.microsoft(&name("context"), "MultiHeadAttention", &inputs, heads)
    }

    /// Keys or values `[batch, kv_heads, keys, head_dim]`, for each query head.
    fn for_every_head(&self, b: &mut Builder, name: &str, x: &str) -> Name {
        let (heads, groups) = (self.config.num_attention_heads, self.groups());
        if heads == groups {
            return x.to_owned();
        }
        let axis = b.ints("constants.group_axis", &[2]);
        let copies = b.ints("shapes.group_copies", &[1, 1, (heads / groups) as i64, 1, 1]);
        let width = self.config.head_dim as i64;
        let joined = b.ints("shapes.every_head", &[0, heads as i64, -1, width]);
        let x = b.op(&format!("{name}.column"), "Unsqueeze", &[x, &axis]);
        let x = b.op(&format!("{name}.copies"), "Expand", &[&x, &copies]);
        b.op(&format!("{name}.every_head"), "Reshape", &[&x, &joined])
    }
}

/// How the queries of these columns, or of every one, are divided.
fn blocks(b: &mut Builder, place: &str, columns: Option<&str>) -> Blocks {
    let name = |part: &str| format!("{place}.{part}");
    let rows = match columns {
        None => "mask.sequence".to_owned(),
        Some(columns) => b.op(&name("rows"), "Size", &[columns]),
    };
    let (one, most) = (b.int("constants.one", 1), b.int("constants.block", QUERIES));
    let but_one = b.int("constants.block_but_one", QUERIES - 1);
    let up = b.op(&name("rows.up"), "Add", &[&rows, &but_one]);
    let count = b.op(&name("blocks.count"), "Div", &[&up, &most]);
    let last = b.op(&name("rows.last"), "Sub", &[&rows, &one]);
    let up = b.op(&name("rows.up_to_blocks"), "Add", &[&last, &count]);
    let size = b.op(&name("blocks.size"), "Div", &[&up, &count]);
    Blocks { rows, count, size, last }
}
