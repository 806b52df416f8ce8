//! A tree of processes under one `uhmm run`.
//!
//! | room         | holds                                                                                |
//! |--------------|--------------------------------------------------------------------------------------|
//! | [`protocol`] | what processes and their keeper say to each other                                    |
//! | [`keeper`]   | the process that outlives any of them: shared pages, orphans, and tidying up         |
//! | [`shared`]   | statistics in memory that they share                                                 |

pub mod client;
pub mod keeper;
mod orphan;
pub mod protocol;
pub mod shared;
pub mod table;
