//! Numbers that a seed fixes, the same on any machine: `SplitMix64`.

/// What the state grows by from one number to the next.
pub(crate) const INCREMENT: u64 = 0x9e37_79b9_7f4a_7c15;

/// `length` numbers drawn uniformly from `0..count`: the same for the same seed.
pub fn draw(count: usize, seed: u64, length: usize) -> Vec<i64> {
    // Seeds that follow one another must not give sequences that overlap.
    let mut state = mix(seed.wrapping_add(1));
    let numbers = || {
        state = state.wrapping_add(INCREMENT);
        // The upper half of a product with the count: uniform up to one part in 2^64 / count.
        ((u128::from(mix(state)) * count as u128) >> 64) as i64
    };
    std::iter::repeat_with(numbers).take(length).collect()
}

/// A state's number.
pub(crate) const fn mix(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_fixed_by_the_seed_and_fill_the_vocabulary() {
        assert_eq!(draw(49_152, 0, 4), draw(49_152, 0, 4));
        assert_ne!(draw(49_152, 0, 4), draw(49_152, 1, 4));
        assert_ne!(draw(49_152, 0, 4)[1..], draw(49_152, 1, 4)[..3], "not one sequence, shifted");
        let many = draw(10, 7, 1000);
        for token in 0..10 {
            let count = many.iter().filter(|&&t| t == token).count();
            assert!((60..140).contains(&count), "{token} came {count} times");
        }
    }
}
