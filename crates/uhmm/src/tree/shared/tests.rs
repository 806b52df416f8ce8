use super::*;

#[test]
fn buckets_follow_each_other_and_bound_their_values() {
    let mut last = 0;
    for ns in (0..100_000).chain((0..40).map(|shift| (1_u64 << shift) + 1)) {
        let bucket = bucket_of(ns);
        assert!(bucket >= last || ns < 100_000, "{ns}");
        if ns < 100_000 {
            last = bucket;
        }
        if bucket < BUCKETS - 1 {
            assert!(ns <= bucket_end(bucket), "{ns} is in bucket {bucket}");
            assert!(bucket == 0 || ns > bucket_end(bucket - 1), "{ns} is in bucket {bucket}");
        }
    }
    assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    assert_eq!(bucket_end(BUCKETS - 1), (1 << 33) - 1);
}

#[test]
fn quantiles_are_right_to_a_quarter_of_a_power_of_two() {
    let latency = Latency::default();
    assert_eq!(latency.quantile(0.5), None);
    for us in 1..=1000 {
        latency.record(us * 1000);
    }
    for (q, exact) in [(0.0, 1_000), (0.5, 500_000), (0.99, 990_000), (1.0, 1_000_000)] {
        let found = latency.quantile(q).unwrap().as_nanos() as f64;
        assert!(found >= f64::from(exact) && found <= f64::from(exact) * 1.26, "{q}: {found}");
    }
    assert_eq!(latency.snapshot().total(), 1000);
}

#[test]
fn totals_are_sums_and_the_largest_peak() {
    let (one, two) = (ProcessBlock::default(), ProcessBlock::default());
    for (block, times) in [(&one, 1_u64), (&two, 2)] {
        block.note_resident(ByteSize::mib(times * 10));
        block.note_resident(ByteSize::mib(1));
        block.waiting_ns.store(times * 100, Ordering::Relaxed);
        block.stats.add(Counter::Faults, times as usize);
        let mut skipped = uhmm_core::stats::Skipped::default();
        skipped.add(Skip::Busy, times as usize);
        block.stats.skip(&skipped);
        block.latency.record(50);
    }
    let mut totals = Totals::default();
    totals.fold(&one);
    totals.fold(&two);
    assert_eq!(totals.peak_resident_bytes, 20 << 20);
    assert_eq!((totals.waiting_ns, totals.get(Counter::Faults)), (300, 3));
    assert_eq!(totals.skipped().collect::<Vec<_>>(), [(Skip::Busy, 3)]);
    assert_eq!(totals.latency.total(), 2);
}

#[test]
fn a_cleared_block_has_nothing_in_it() {
    let block = ProcessBlock::default();
    block.pid.store(1, Ordering::Relaxed);
    block.stats.add(Counter::MovedOut, 5);
    block.latency.record(u64::MAX);
    block.clear();
    let mut totals = Totals::default();
    totals.fold(&block);
    assert_eq!((totals, block.pid.load(Ordering::Relaxed)), (Totals::default(), 0));
}
