//! Rows about migration: RAM to a device that is memory, and back, against memcpy between the same memories.

use std::sync::Arc;
use std::time::Instant;

use uhmm::yardstick::{Copying, pattern};
use uhmm::{Buffer, ByteSize, Geometry, MemDevice, Skipped, Space};

use super::Measure;
use super::row::{Pair, RowError, Scale, gigabytes};

/// Bytes in a page.
pub(crate) const PAGE: usize = Geometry::K4.bytes();
/// Words in a page.
pub(crate) const WORDS: usize = PAGE / size_of::<u64>();

/// Writes its pattern into every page.
fn mark(buffer: &mut Buffer<u64>) {
    for (page, words) in buffer.chunks_exact_mut(WORDS).enumerate() {
        words[0] = pattern(page);
        words[WORDS - 1] = !pattern(page);
    }
}

/// A buffer whose pages are all there, of one size, and [`mark`]ed.
pub(crate) fn marked(space: &Space, size: ByteSize, pages: Geometry) -> Result<Buffer<u64>, RowError> {
    let words = size.bytes() as usize / size_of::<u64>();
    let huge = pages == Geometry::M2;
    let buffer = if huge { space.map_huge::<u64>(words) } else { space.map::<u64>(words) };
    let mut buffer = buffer.map_err(RowError::unavailable)?;
    if !huge {
        buffer.advise_no_huge().map_err(RowError::unavailable)?;
    }
    mark(&mut buffer);
    Ok(buffer)
}

/// Checks that every page holds what [`mark`] wrote.
pub(crate) fn check(buffer: &Buffer<u64>) -> Result<(), RowError> {
    for (page, words) in buffer.chunks_exact(WORDS).enumerate() {
        if words[0] != pattern(page) || words[WORDS - 1] != !pattern(page) {
            return Err(RowError::WrongData { page });
        }
    }
    Ok(())
}

/// Sends all of `buffer` to the device; anything that stays behind would falsify a figure.
pub(crate) fn send_away(space: &Space, buffer: &Buffer<u64>) -> Result<(), RowError> {
    let of = buffer.range().pages();
    let sent = space.migrate(buffer.range()).map_err(RowError::unavailable)?;
    let (moved, skipped) = (sent.moved, sent.skipped);
    if moved == of { Ok(()) } else { Err(RowError::Incomplete { moved, of, skipped: Box::new(skipped) }) }
}

fn bring_back(space: &Space, buffer: &Buffer<u64>) -> Result<(), RowError> {
    let of = buffer.range().pages();
    let moved = space.prefetch(buffer.range()).map_err(RowError::unavailable)?;
    let skipped = Skipped::default();
    if moved == of { Ok(()) } else { Err(RowError::Incomplete { moved, of, skipped: Box::new(skipped) }) }
}

/// Which way a row goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    /// From RAM to the device.
    Out,
    /// From the device to RAM.
    In,
}

/// One row: all of a buffer, in pages of one size, one way.
pub(crate) fn migrate(
    name: &'static str,
    way: Way,
    pages: Geometry,
    scale: Scale,
) -> Result<Measure, RowError> {
    let size = scale.pick(ByteSize::mib(128), ByteSize::mib(8));
    let huge = pages == Geometry::M2;
    let device = MemDevice::private(size).map_err(RowError::unavailable)?;
    let space =
        Space::builder().device(Arc::new(device)).huge_pages(huge).arena(ByteSize::new(2 * size.bytes()));
    let space = space.build().map_err(RowError::unavailable)?;
    let buffer = marked(&space, size, pages)?;
    // The device's memory is of huge pages, where the system has them.
    let (from, to) = if way == Way::Out { (pages, Geometry::M2) } else { (Geometry::M2, pages) };
    let mut copying = Copying::new(size, from, to).map_err(RowError::unavailable)?;
    let mut pair = Pair::default();
    for round in 0..scale.warm_up() + scale.rounds() {
        let start = Instant::now();
        send_away(&space, &buffer)?;
        let out = start.elapsed();
        let start = Instant::now();
        bring_back(&space, &buffer)?;
        let back = start.elapsed();
        let copied = copying.run(pages).map_err(RowError::yardstick)?;
        pair.add(scale, round, if way == Way::Out { out } else { back }, copied);
        check(&buffer)?;
    }
    let (limit_name, goal) = if huge { ("memcpy, 2M pieces", 0.90) } else { ("memcpy, 4K pieces", 0.70) };
    Ok(pair.measure(name, "GB/s", gigabytes(size), limit_name, goal))
}
