-- What moves a run as a whole: pause and resume.

alter table inbox drop constraint inbox_kind_check;
alter table inbox add constraint inbox_kind_check
  check (kind in ('signal','cancel','unblock','child','pause','resume'));
