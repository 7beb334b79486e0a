-- Requests into runs that are answered, and the end of a child with its parent.

-- `update` is answered in the run's history; `terminate` ends a run at once, when it is read.
alter table inbox drop constraint inbox_kind_check;
alter table inbox add constraint inbox_kind_check
  check (kind in ('signal','cancel','unblock','child','pause','resume','update','terminate'));

-- Transitions that the run had made when the message was sent: whoever looks for its answer begins behind them.
-- Rows of older releases say 0, which is true and slower.
alter table inbox add run_seq bigint not null default 0;
