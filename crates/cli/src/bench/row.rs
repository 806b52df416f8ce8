//! What rows have in common: how much they measure, why they cannot, and how a figure is made of samples.

use std::error::Error;
use std::io;
use std::time::Duration;

use uhmm::{ByteSize, PageCount, Skipped};

use super::Measure;
use super::samples::Samples;
use crate::print;

/// How much is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scale {
    /// Little, to see that every row works and moves the right bytes.
    Quick,
    /// Enough for figures.
    Full,
}

impl Scale {
    /// One of two values.
    pub(crate) fn pick<T>(self, full: T, quick: T) -> T {
        if self == Self::Full { full } else { quick }
    }

    /// Rounds that are not counted: device pages and frames come into being.
    pub(crate) fn warm_up(self) -> usize {
        self.pick(2, 1)
    }

    /// Rounds that are.
    pub(crate) fn rounds(self) -> usize {
        self.pick(9, 3)
    }
}

/// Why a row has no figure.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RowError {
    /// Not a slow row but a broken one.
    #[error("WRONG DATA: page {page} came back with other contents")]
    WrongData {
        /// Which page of the buffer; the first, where only a sum is known to be wrong.
        page: usize,
    },
    /// Pages stayed where they were.
    #[error("only {} of {} pages moved; skipped: {skipped:?}", moved.get(), of.get())]
    Incomplete {
        /// So many moved.
        moved: PageCount,
        /// Of so many.
        of: PageCount,
        /// Why the others did not, as far as is known.
        skipped: Box<Skipped>,
    },
    /// The system refuses something.
    #[error("cannot be measured here: {0}")]
    Unavailable(String),
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

impl RowError {
    /// The system refuses what a row needs.
    pub(crate) fn unavailable(error: impl Error) -> Self {
        Self::Unavailable(chain(&error))
    }

    /// The limit cannot be measured, or moved wrong bytes.
    pub(crate) fn yardstick(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::InvalidData {
            return Self::WrongData { page: 0 };
        }
        Self::Unavailable(format!("the limit: {}", chain(&error)))
    }
}

/// Spread of the samples from which on a figure is doubted.
const NOISY: f64 = 0.30;

/// Samples of ours and of the limit, taken in turns.
#[derive(Debug, Default)]
pub(crate) struct Pair {
    /// Ours.
    pub(crate) ours: Samples,
    /// The limit's.
    pub(crate) limit: Samples,
}

impl Pair {
    /// Notes one round, if it counts.
    pub(crate) fn add(&mut self, scale: Scale, round: usize, ours: Duration, limit: Duration) {
        if round >= scale.warm_up() {
            self.ours.add(ours);
            self.limit.add(limit);
        }
    }

    /// The figure: both medians, in the unit that `convert` makes of seconds.
    pub(crate) fn measure(
        &self,
        name: &'static str,
        unit: &'static str,
        convert: impl Fn(f64) -> f64,
        limit_name: &'static str,
        goal: f64,
    ) -> Measure {
        for (whose, samples) in [("its times", &self.ours), ("the limit's times", &self.limit)] {
            if samples.spread() > NOISY {
                let spread = samples.spread() * 100.0;
                print::note(&format!(
                    "uhmm: {name}: {whose} differ by {spread:.0} %: the machine is busy, measure again"
                ));
            }
        }
        let (ours, limit) = (self.ours.median(), self.limit.median());
        let ratio = limit / ours;
        let met = ratio >= goal;
        let (value, limit) = (convert(ours), convert(limit));
        Measure { name, value, unit, limit, limit_name, ratio, goal, most: None, met }
    }
}

/// Seconds for `size` bytes as gigabytes per second.
pub(crate) fn gigabytes(size: ByteSize) -> impl Fn(f64) -> f64 {
    move |seconds| size.bytes() as f64 / seconds / 1e9
}

/// Seconds for one page as microseconds.
pub(crate) fn microseconds(seconds: f64) -> f64 {
    seconds * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(ours: u64, limit: u64) -> Pair {
        let mut pair = Pair::default();
        for round in 0..5 {
            pair.add(Scale::Quick, round, Duration::from_millis(ours), Duration::from_millis(limit));
        }
        pair
    }

    #[test]
    fn twice_the_time_is_half_the_ratio() {
        let figure = pair(20, 10).measure("row", "us", microseconds, "limit", 0.5);
        assert!((figure.ratio - 0.5).abs() < 1e-9 && figure.met);
        assert!((figure.value - 20_000.0).abs() < 1e-6);
        assert!(!pair(21, 10).measure("row", "us", microseconds, "limit", 0.5).met);
    }

    #[test]
    fn speed_is_size_by_time() {
        assert!((gigabytes(ByteSize::new(2_000_000_000))(0.5) - 4.0).abs() < 1e-9);
    }
}
