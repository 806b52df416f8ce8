//! Repeated measurements: the median, and whether it can be believed.

use std::time::Duration;

/// Times of the same work, in seconds, in the order they were taken.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    seconds: Vec<f64>,
}

impl Samples {
    /// One more.
    pub(crate) fn add(&mut self, took: Duration) {
        self.seconds.push(took.as_secs_f64());
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.seconds.is_empty()
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    /// The median in seconds; never zero, so that it can be divided by.
    pub(crate) fn median(&self) -> f64 {
        let sorted = self.sorted();
        sorted.get(sorted.len() / 2).copied().unwrap_or_default().max(1e-9)
    }

    /// How far the quartiles lie apart, as a share of the median.
    pub(crate) fn spread(&self) -> f64 {
        let sorted = self.sorted();
        match (sorted.get(sorted.len() / 4), sorted.get(sorted.len() * 3 / 4)) {
            (Some(low), Some(high)) => (high - low) / self.median(),
            _ => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Samples;
    use std::time::Duration;

    fn samples(millis: &[u64]) -> Samples {
        let mut samples = Samples::default();
        millis.iter().for_each(|n| samples.add(Duration::from_millis(*n)));
        samples
    }

    #[test]
    fn the_median_ignores_an_outlier_and_the_spread_too() {
        let samples = samples(&[10, 11, 500, 10, 10]);
        assert!((samples.median() - 0.010).abs() < 1e-9);
        assert!(samples.spread() < 0.2);
    }

    #[test]
    fn half_of_the_runs_disturbed_is_a_spread() {
        assert!(samples(&[10, 20, 10, 20, 10, 20]).spread() > 0.3);
    }

    #[test]
    fn no_samples_are_no_division_by_zero() {
        assert!(samples(&[]).median() > 0.0);
    }
}
