-- The ledger's third part: what 0021 left unchecked is checked, nothing of the ledger can be emptied, an approved sum goes along a
-- chain of runs, and reports by time have their index.
--
-- Forward only. The release before works on this schema: the one new column may be null.
--
-- What an operator has to expect: one transaction. The two constraints are checked while everybody works. Then whoever locks a user
-- row waits at that door (no attempt starts, ends or calls a model; reads go on) while an index over `activity_attempts` is built, some
-- seconds per million rows: on a large database build it beforehand, by its own `create index concurrently` under the same name. Gives
-- up after five seconds of waiting for a lock; nothing was changed then, run it again.
set local lock_timeout = '5s';

-- Old rows fulfill both: the columns were made empty together, and the states before were among those of now.
alter table users validate constraint users_holds_stopped_check;
alter table payments validate constraint payments_refund_state_check;

-- Everything that writes the ledger locks a user row first, so nobody holds a part of what follows and waits for another one.
lock table users in exclusive mode;

-- A trigger for rows does not see `truncate`.
create trigger credit_transactions_no_truncate before truncate on credit_transactions for each statement execute function append_only();
create trigger model_pricing_no_truncate before truncate on model_pricing for each statement execute function append_only();
create trigger refund_rules_no_truncate before truncate on refund_rules for each statement execute function append_only();
create trigger project_records_no_truncate before truncate on project_records for each statement execute function append_only();
create trigger spending_limits_no_truncate before truncate on spending_limits for each statement execute function append_only();

-- The runs of a chain spend from one sum: `cap_ucr` bounds what all of them that have a row here have captured and held, with the runs
-- below them. A run that holds under a limit which it has from its chain or its origin gets a row that repeats it.
alter table spending_limits add column first_run_id uuid;  -- of the chain; null: the run is the first, or in none
create index spending_limits_chain on spending_limits ((coalesce(first_run_id, run_id)));

-- Of a report over all users.
create index if not exists activity_attempts_ended on activity_attempts (ended_at) where ended_at is not null;
