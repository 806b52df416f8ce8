//! Faults: a thread touched a page that is not there, and what is done about it.
//!
//! What    [`decide`] is the decision table, event by page state; `resolve` carries the action out;
//!         [`window`] says how many neighbours come along.
//! Why     the table is small enough to be read and tested whole, and every engine shares it.
//! Rule    R7: nothing here allocates, touches managed memory, or waits for a lock that an application
//!         thread may hold while it does. All memory needed is in a [`Scratch`] made beforehand.
//! Races   two faulters on one page: one claims the word, the other finds it moving, leaves the waited
//!         flag and is woken. A fault against an event that is pending: the host answers
//!         [`Stop::Pending`](crate::host::Stop::Pending), the claim is given back, and the caller reads the
//!         events before it looks again. A fault against a move out: the page is staged, and is taken
//!         back from its slot.
//! Fails   a device that cannot give the page poisons it ([`Resolution::Poisoned`], rule R1).

pub mod decide;
mod fetch;
mod fill;
mod huge;
mod install;
mod lift;
mod replace;
mod resolve;
mod scratch;
mod take_back;
pub mod window;

pub use decide::Access;
pub use replace::Replacement;
pub use resolve::{Fault, Resolution};
pub use scratch::{MAX_WINDOW, Scratch};
