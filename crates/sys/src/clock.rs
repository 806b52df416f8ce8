//! The clock that only goes forward, by a call that neither allocates nor keeps anything: for fault handlers.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The time since some fixed moment.
pub fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
