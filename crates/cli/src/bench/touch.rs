//! Memory on a device that is touched page after page, against memory that is touched for the first time.

use uhmm::yardstick::first_touch;
use uhmm::{ByteSize, Engine};

use super::Measure;
use super::fault::{managed, touch_all};
use super::row::{Pair, RowError, Scale, gigabytes};

/// Touches in order; windows grow as far as they do.
pub(crate) fn sequential(name: &'static str, scale: Scale) -> Result<Measure, RowError> {
    let size = scale.pick(ByteSize::mib(128), ByteSize::mib(8));
    let (space, buffer) = managed(Engine::Signal, size)?;
    let order: Vec<usize> = (0..size.pages().get()).collect();
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let ours = touch_all(&space, &buffer, &order)?;
        let fresh = first_touch(size).map_err(RowError::yardstick)?;
        pair.add(scale, round, ours.whole, fresh);
    }
    let megabytes = |seconds| gigabytes(size)(seconds) * 1e3;
    Ok(pair.measure(name, "MB/s", megabytes, "first touch of fresh memory, 4K pages", 3.0))
}
