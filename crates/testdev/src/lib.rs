//! For tests of uhmm only.
//!
//! What     fakes of the ports of `uhmm_core` that fail and wait when told to, and the behaviour suites that
//!          every implementation of a port passes.
//! Why      one text says what a device or a host must do, and each of them is held to it.

pub mod device_suite;
pub mod fake_device;
pub mod sim_host;
