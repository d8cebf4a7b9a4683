//! Each kernel against a slow reference, over shapes that are no multiples of anything.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)]

mod reference;

use baton_cuda::single::{Attention, Product, Single, Span, Target};
use baton_cuda::{HEAD_DIMS, Shape, bf16};
use reference::{Random, assert_close, device, multiply, rms_norm, rounded, silu};

/// Of a result in bf16.
const HALF: f32 = 1.0 / 128.0;
/// Of a sum in single precision, in another order.
const SINGLE: f32 = 1e-4;

fn single() -> Single {
    Single::new(&device(), 64).unwrap()
}

fn floats(halves: &[bf16]) -> Vec<f32> {
    halves.iter().map(|x| x.to_f32()).collect()
}

#[test]
fn embedding_takes_rows() {
    let mut random = Random::new(1);
    let single = single();
    for hidden in [32, 576, 2080] {
        let table = random.halves(50 * hidden, 1.0);
        let tokens = [3, 0, 49, 3, 17];
        let got = single.embed(&tokens, &table, hidden).unwrap();
        let rows = tokens.iter().flat_map(|&token| &table[token as usize * hidden..][..hidden]);
        assert_eq!(got, rows.map(|x| x.to_f32()).collect::<Vec<_>>());
    }
}

#[test]
fn norm_is_that_of_each_row() {
    let mut random = Random::new(2);
    let single = single();
    for hidden in [32, 576, 1536, 4128, 8192, 9248] {
        let (x, weight) = (random.floats(7 * hidden, 3.0), random.floats(hidden, 1.0));
        let row = |i: usize| rms_norm(&x[i * hidden..][..hidden], &weight, 1e-5);
        let got = single.rms_norm(&x, &weight, None, 1e-5).unwrap();
        let expected: Vec<f32> = (0..7).flat_map(row).collect();
        assert_close("all rows", &floats(&got), &expected, HALF);
        let got = single.rms_norm(&x, &weight, Some(&[6, 2, 2]), 1e-5).unwrap();
        let expected: Vec<f32> = [6, 2, 2].into_iter().flat_map(row).collect();
        assert_close("some rows", &floats(&got), &expected, HALF);
    }
}

#[test]
fn gate_opens_for_what_is_up() {
    let mut random = Random::new(3);
    let pairs = random.halves(2 * 8 * 999, 8.0);
    let got = single().gated(&pairs).unwrap();
    let pair = |pair: &[bf16]| silu(pair[0].to_f32()) * pair[1].to_f32();
    let expected: Vec<f32> = pairs.chunks_exact(2).map(pair).collect();
    assert_close("gated", &floats(&got), &expected, HALF);
}

#[test]
fn narrow_products_are_products() {
    let mut random = Random::new(4);
    let single = single();
    // Rows around the kernels' limits; columns and inner widths around the tiles'.
    for rows in [1, 2, 3, 7, 8, 9, 16, 17, 31, 32] {
        for (n, k) in [(8, 32), (64, 96), (50, 288), (131, 576), (328, 2080)] {
            if rows > 3 && k > 1000 && rows != 17 {
                continue;
            }
            let (x, w) = (random.halves(rows * k, 1.0), random.halves(n * k, 0.2));
            let add = random.floats(rows * n, 1.0);
            let product = |target| Product { w: &w, rows, n, k, target };
            let expected = multiply(&floats(&x), &w, k);
            let what = format!("{rows} rows, {n} columns of {k}");
            let got = single.narrow(&x, &product(Target::Floats), &[]).unwrap();
            assert_close(&what, &got, &expected, SINGLE);
            let got = single.narrow(&x, &product(Target::Add), &add).unwrap();
            let sums: Vec<f32> = expected.iter().zip(&add).map(|(x, add)| x + add).collect();
            assert_close(&what, &got, &sums, SINGLE);
            if rows > 2 {
                let got = single.narrow(&x, &product(Target::Store), &[]).unwrap();
                assert_close(&what, &got, &expected, HALF);
            }
            if n % 2 == 0 {
                let got = single.narrow(&x, &product(Target::Gated), &[]).unwrap();
                let pair = |pair: &[f32]| silu(pair[0]) * pair[1];
                let gated: Vec<f32> = expected.chunks_exact(2).map(pair).collect();
                assert_close(&what, &got, &gated, HALF);
            }
        }
    }
}

#[test]
fn a_norm_can_follow_its_product() {
    let mut random = Random::new(5);
    let single = single();
    for rows in [1, 2] {
        for (n, k) in [(8, 32), (130, 576), (64, 4128)] {
            let (x, norm) = (random.floats(rows * k, 4.0), random.floats(k, 1.0));
            let w = random.halves(n * k, 0.2);
            // What the kernel multiplies: the row before its factor.
            let row = |x: &[f32]| {
                let factor =
                    (x.iter().map(|x| x * x).sum::<f32>() / k as f32 + 1e-6).sqrt().recip();
                let before: Vec<f32> = x.iter().zip(&norm).map(|(x, w)| rounded(x * w)).collect();
                multiply(&before, &w, k).into_iter().map(|x| x * factor).collect::<Vec<_>>()
            };
            let expected: Vec<f32> = x.chunks_exact(k).flat_map(row).collect();
            let product = |target| Product { w: &w, rows, n, k, target };
            let got = single.normed(&x, &norm, 1e-6, &product(Target::Store)).unwrap();
            assert_close("stored", &got, &expected, HALF);
            let got = single.normed(&x, &norm, 1e-6, &product(Target::Gated)).unwrap();
            let pair = |pair: &[f32]| silu(pair[0]) * pair[1];
            let gated: Vec<f32> = expected.chunks_exact(2).map(pair).collect();
            assert_close("gated", &got, &gated, HALF);
        }
    }
}

#[test]
fn wide_products_are_products() {
    let mut random = Random::new(6);
    let single = single();
    for (rows, n, k) in [(1, 8, 32), (33, 72, 96), (130, 200, 288)] {
        let (x, w) = (random.halves(rows * k, 1.0), random.halves(n * k, 0.2));
        let add = random.floats(rows * n, 1.0);
        let expected = multiply(&floats(&x), &w, k);
        let product = |target| Product { w: &w, rows, n, k, target };
        let got = single.wide(&x, &product(Target::Store), &[]).unwrap();
        assert_close("stored", &got, &expected, HALF);
        let got = single.wide(&x, &product(Target::Floats), &[]).unwrap();
        assert_close("floats", &got, &expected, SINGLE);
        let got = single.wide(&x, &product(Target::Add), &add).unwrap();
        let sums: Vec<f32> = expected.iter().zip(&add).map(|(x, add)| x + add).collect();
        assert_close("added", &got, &sums, SINGLE);
    }
}

/// Compares attention over these spans, given as start and count, and what was written to the blocks.
fn check_attention(
    random: &mut Random,
    shape: &Shape,
    spans: &[(usize, usize)],
    splits: usize,
    fused: bool,
    with: bool,
) {
    let single = Single::new(&device(), shape.head_dim).unwrap();
    let d = shape.head_dim;
    let needed = |(start, count): (usize, usize)| (start + count).div_ceil(shape.block_size);
    let total: usize = spans.iter().map(|span| needed(*span)).sum::<usize>() + 2;
    let mut blocks = random.blocks(total - 2, total);
    let spans: Vec<Span> = spans
        .iter()
        .map(|&(start, count)| {
            let rest = blocks.split_off(needed((start, count)));
            Span { start, count, blocks: std::mem::replace(&mut blocks, rest) }
        })
        .collect();
    let rows: usize = spans.iter().map(|span| span.count).sum();
    let width = (shape.heads + 2 * shape.kv_heads) * d;
    let longest = spans.iter().map(|span| span.start + span.count).max().unwrap_or(0);
    let angles = reference::angles(shape, longest, None);
    let qkv = random.halves(rows * width, 2.0);
    let mut kv = random.halves(total * shape.block_bytes() / 2, 2.0);
    // What no sequence has written yet: must not count for anything.
    for span in &spans {
        let end = span.blocks.len() * shape.block_size;
        for at in span.start + span.count..end {
            for head in 0..shape.kv_heads {
                let (key, value) = reference::places(shape, 1, head, &span.blocks, at);
                kv[key..][..d].fill(bf16::NAN);
                kv[value..][..d].fill(bf16::NAN);
            }
        }
    }
    let mut expected_kv = kv.clone();
    let (bias, q, k) = (random.floats(width, 1.0), random.floats(d, 1.0), random.floats(d, 1.0));
    let attention = |kv| Attention {
        shape,
        layer: 1,
        qkv: &qkv,
        kv,
        spans: &spans,
        bias: with.then_some(&bias[..]),
        norms: with.then_some((&q[..], &k[..])),
        angles: &angles,
        splits,
        fused,
    };
    let expected = reference::attention(&mut attention(&mut expected_kv));
    let got = single.attention(attention(&mut kv)).unwrap();
    let starts: Vec<_> = spans.iter().map(|span| (span.start, span.count)).collect();
    let what = format!("{shape:?}, {starts:?}, {splits} splits, fused {fused}");
    assert_close(&what, &floats(&got), &expected, 2.0 * HALF);
    for (i, (got, expected)) in kv.iter().zip(&expected_kv).enumerate() {
        let (got, expected) = (got.to_f32(), expected.to_f32());
        let same = got == expected
            || (got.is_nan() && expected.is_nan())
            || (got - expected).abs() <= HALF * expected.abs().max(0.1);
        assert!(same, "{what}: blocks at {i}: {got}, expected {expected}");
    }
}

fn shape(head_dim: usize, kv_heads: usize, group: usize, block_size: usize) -> Shape {
    Shape {
        layers: 2,
        hidden: 64,
        heads: kv_heads * group,
        kv_heads,
        head_dim,
        ffn: 64,
        vocab: 64,
        rope_theta: 10_000.0,
        interleaved: group % 2 == 1,
        rms_eps: 1e-5,
        block_size,
    }
}

#[test]
fn one_new_token_attends_to_all_before() {
    let mut random = Random::new(7);
    let spans = [(0, 1), (1, 1), (14, 1), (15, 1), (16, 1), (63, 1), (64, 1), (200, 1), (333, 1)];
    for (i, head_dim) in HEAD_DIMS.into_iter().enumerate() {
        for (group, block_size) in [(1, 16), (3, 16), (8, 5), (4, 32), (16, 7)] {
            let shape = shape(head_dim, 1 + i % 2, group, block_size);
            let splits = 1 + random.below(7);
            let fused = group != 3;
            check_attention(&mut random, &shape, &spans, splits, fused, group % 2 == 0);
        }
    }
}

#[test]
fn a_long_sequence_is_split_over_many_blocks() {
    let mut random = Random::new(8);
    let shape = shape(64, 2, 4, 16);
    for splits in [1, 2, 9, 64] {
        check_attention(&mut random, &shape, &[(1500, 1), (40, 1)], splits, true, false);
    }
}

#[test]
fn new_tokens_attend_to_all_before_them() {
    let mut random = Random::new(9);
    for (i, head_dim) in HEAD_DIMS.into_iter().enumerate() {
        for (group, block_size) in [(1, 16), (3, 16), (8, 5), (4, 32)] {
            let shape = shape(head_dim, 1 + i % 2, group, block_size);
            // From the start, from the middle of a block, ends in and beyond a tile.
            let spans = [(0, 5), (0, 64), (3, 2), (61, 7), (130, 70), (64, 1)];
            check_attention(&mut random, &shape, &spans, 1, false, group % 2 == 0);
        }
    }
}

#[test]
fn a_long_prompt_attends_to_all_before_it() {
    let mut random = Random::new(10);
    let shape = shape(64, 2, 4, 16);
    check_attention(&mut random, &shape, &[(0, 400), (333, 150)], 1, false, false);
}
