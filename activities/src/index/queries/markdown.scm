(section (atx_heading heading_content: (inline) @name)) @definition.section
; The grammar opens no section for an underlined heading: only the heading's own lines are known.
(setext_heading heading_content: (paragraph) @name) @definition.section
