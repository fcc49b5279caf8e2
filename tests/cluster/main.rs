//! Real processes, real sockets, real kills. Clients, providers and router write histories; a checker reads them and decides.

mod crash;
mod disk;
mod faults;
mod money;
mod store;
