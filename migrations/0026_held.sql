-- When a fork that is held back has to end: its time counts from the fork, whether it has a place or not.
--
-- Forward only. The release before works on this schema: its forks have no such instant and wait until they are let in.
--
-- What an operator has to expect: no table is rewritten or scanned. Gives up after five seconds of waiting for a lock; nothing was
-- changed then, run it again.
set local lock_timeout = '5s';
alter table admissions add column deadline timestamptz;
