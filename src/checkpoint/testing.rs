//! Random damage to files, the same in every run.

/// A source of damaged copies.
#[derive(Debug)]
pub(super) struct Damage(u64);

impl Damage {
    /// A source that gives the same copies for the same `seed`.
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number under `limit` (`SplitMix64`).
    fn next(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % limit.max(1) as u64) as usize
    }

    /// A copy of `bytes` with one to four bytes changed, removed, inserted or repeated, or cut off.
    pub(super) fn apply(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut damaged = bytes.to_vec();
        for _ in 0..=self.next(4) {
            let at = self.next(damaged.len());
            match self.next(8) {
                _ if damaged.is_empty() => {}
                0 => damaged.truncate(at),
                1 => drop(damaged.remove(at)),
                2 => damaged.insert(at, self.next(256) as u8),
                3 => {
                    let end = (at + 1 + self.next(64)).min(damaged.len());
                    damaged.extend_from_within(at..end);
                }
                4 => damaged[at] ^= 1 << self.next(8),
                5 => {
                    let other = self.next(damaged.len());
                    damaged[at] = damaged[other];
                }
                _ => damaged[at] = self.next(256) as u8,
            }
        }
        damaged
    }
}
