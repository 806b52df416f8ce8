//! Rows about single faults: a page on a device is touched, and nothing but that page comes home.

use std::sync::Arc;
use std::time::{Duration, Instant};

use uhmm::yardstick::{self, SignalFaults, ThreadFaults, pattern, shuffled, touch};
use uhmm::{Buffer, ByteSize, Counter, Engine, Geometry, MemDevice, Space};

use super::Measure;
use super::migrate::{check, marked, send_away};
use super::row::{Pair, RowError, Scale, microseconds};

/// A space with a buffer of 4K pages and a device that holds them all.
pub(crate) fn managed(engine: Engine, size: ByteSize) -> Result<(Space, Buffer<u64>), RowError> {
    let device = MemDevice::private(size).map_err(RowError::unavailable)?;
    let space = Space::builder().device(Arc::new(device)).engine(engine);
    let space = space.arena(ByteSize::new(2 * size.bytes())).build().map_err(RowError::unavailable)?;
    let buffer = marked(&space, size, Geometry::K4)?;
    Ok((space, buffer))
}

/// What touching a buffer that was away cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Touched {
    /// All of it.
    pub(crate) whole: Duration,
    /// One fault, on average.
    pub(crate) fault: Duration,
}

/// Sends all pages away and touches those of `order`.
pub(crate) fn touch_all(space: &Space, buffer: &Buffer<u64>, order: &[usize]) -> Result<Touched, RowError> {
    send_away(space, buffer)?;
    let before = space.count(Counter::Faults);
    let start = Instant::now();
    let sum = touch::<u64>(buffer, order);
    let whole = start.elapsed();
    let faults = space.count(Counter::Faults) - before;
    if sum != order.iter().fold(0_u64, |sum, page| sum.wrapping_add(pattern(*page))) {
        return Err(RowError::WrongData { page: 0 });
    }
    check(buffer)?;
    Ok(Touched { whole, fault: whole.div_f64(faults.max(1) as f64) })
}

const SIZE: ByteSize = ByteSize::mib(64);
const QUICK: ByteSize = ByteSize::mib(4);

/// One bare fault of a run that touched `pages`.
fn one(run: Duration, pages: usize) -> Duration {
    run.div_f64(pages as f64)
}

/// The faulting thread resolves its own faults.
pub(crate) fn signal(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    let size = scale.pick(SIZE, QUICK);
    let mut raw = SignalFaults::new(size).map_err(RowError::yardstick)?;
    let order = shuffled(raw.pages());
    let (space, buffer) = managed(Engine::Signal, size)?;
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let ours = touch_all(&space, &buffer, &order)?;
        let bare = raw.run(&order).map_err(RowError::yardstick)?;
        pair.add(scale, round, ours.fault, one(bare, order.len()));
    }
    Ok(pair.measure(name, "us", microseconds, "bare SIGBUS, memcpy, UFFDIO_MOVE", 0.77))
}

/// A handler thread resolves the faults of one other, which is tied to a processor. The limit has its handler
/// tied to the same one; ours is left to find that out by itself.
pub(crate) fn threads(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    let size = scale.pick(SIZE, QUICK);
    let mut raw = ThreadFaults::new(size).map_err(RowError::yardstick)?;
    let order = shuffled(raw.pages());
    let (space, buffer) = managed(Engine::Threads, size)?;
    let ways = [
        (yardstick::Way::Move, "bare handler thread, pinned, memcpy, UFFDIO_MOVE"),
        (yardstick::Way::Copy, "bare handler thread, pinned, memcpy, UFFDIO_COPY"),
    ];
    let mut pairs = ways.map(|(way, name)| (way, name, Pair::default()));
    for round in 0..scale.warm_up() + scale.rounds() {
        let ours = yardstick::on_one_processor(|_| touch_all(&space, &buffer, &order));
        let ours = ours.map_err(RowError::yardstick)??;
        for (way, _, pair) in &mut pairs {
            match raw.run(&order, *way) {
                Ok(bare) => pair.add(scale, round, ours.fault, one(bare, order.len())),
                Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {}
                Err(error) => return Err(RowError::yardstick(error)),
            }
        }
    }
    // The faster way is the limit.
    let (_, limit_name, pair) = pairs
        .into_iter()
        .filter(|(_, _, pair)| !pair.limit.is_empty())
        .min_by(|(_, _, a), (_, _, b)| a.limit.median().total_cmp(&b.limit.median()))
        .ok_or_else(|| RowError::Unavailable("no way to resolve a fault works".into()))?;
    Ok(pair.measure(name, "us", microseconds, limit_name, 0.71))
}
