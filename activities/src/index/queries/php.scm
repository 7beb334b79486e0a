(function_definition name: (name) @name) @definition.function
(class_declaration name: (name) @name) @definition.class
(interface_declaration name: (name) @name) @definition.interface
(trait_declaration name: (name) @name) @definition.trait
(enum_declaration name: (name) @name) @definition.enum
(enum_case name: (name) @name) @definition.variant
(method_declaration name: (name) @name) @definition.method
(const_declaration (const_element (name) @name)) @definition.const
(property_declaration (property_element name: (variable_name (name) @name))) @definition.field
